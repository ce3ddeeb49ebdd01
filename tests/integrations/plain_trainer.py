"""A run of transformers' Trainer on a model of ours, with PEFT or as if it were not installed: prints what happened.

usage: plain_trainer.py FOLDER with|without
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if sys.argv[2] == "without":
        for blocked in ("peft", "trl"):
            sys.modules[blocked] = None  # type: ignore[assignment]  # importing it raises ImportError

import torch
from architectures import build
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import deltaw

ROWS = [
    {"input_ids": row, "attention_mask": [1] * 9, "labels": row, "note": "no argument of forward"}
    for row in torch.randint(3, 64, (16, 9), generator=torch.Generator().manual_seed(0)).tolist()
]


class Seen(Trainer):
    """Nothing but a record of what reaches the model."""

    columns: set[str]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.columns = set(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer(where: Path, **values: Any) -> Seen:
    torch.manual_seed(0)
    config = deltaw.LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = deltaw.get_peft_model(build("llama"), config)
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # so that the first checkpoint is the best one, and the last model is not
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(output_dir=str(where), **{**settings, **values})
    rows = Dataset.from_list(ROWS)
    return Seen(model, args, train_dataset=rows, eval_dataset=rows)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def report(where: Path) -> dict[str, Any]:
    """What a run, its checkpoints and a resumed run came to."""
    straight = trainer(where / "straight")
    start = weights(straight.model)
    base = {n: p.clone() for n, p in straight.model.named_parameters() if ".default." not in n}
    straight.train()
    folder = where / "straight" / "checkpoint-2"
    log = straight.state.log_history

    def read(step: int) -> dict[str, torch.Tensor]:
        return weights(deltaw.PeftModel.from_pretrained(build("llama"), where / "straight" / f"checkpoint-{step}"))

    resumed = trainer(where / "resumed", load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=str(folder))
    return {
        "peft": sys.modules.get("peft") is not None,
        "columns": sorted(straight.columns),
        "label_names": straight.label_names,
        "shifted": straight._loss_shifts_labels,
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "eval_loss": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        "files": sorted(p.name for p in folder.iterdir()),
        "moved": not any(torch.equal(start[name], value) for name, value in read(4).items()),
        "base_kept": all(torch.equal(straight.model.get_parameter(n), p) for n, p in base.items()),
        "best_loaded": same(weights(straight.model), read(2)) and not same(read(2), read(4)),
        "resumed": same(weights(resumed.model), read(4)),
        "still_trains": any(p.requires_grad for p in straight.model.parameters()),
    }


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]))))
