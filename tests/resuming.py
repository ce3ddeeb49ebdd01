"""A run small enough to be made twice, and what must be the same of two: weights, optimizer states, what was logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tinychat import tiny_tokenizer

from deltaw import LoraConfig, SFTConfig, SFTTrainer

ROWS = [{"prompt": f"say {i}", "completion": "b" * (1 + 7 * (i % 4))} for i in range(13)]


def lora(**values: Any) -> LoraConfig:
    wanted = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.2, "task_type": "CAUSAL_LM", **values}
    return LoraConfig(**wanted)


def trainer_of(folder: str, where: Path, config: Any = None, rows: Any = ROWS, **values: Any) -> SFTTrainer:
    """13 rows in batches of 2, two of them a step: 4 steps an epoch, the last of one small batch."""
    wanted: dict[str, Any] = {
        "output_dir": str(where), "num_train_epochs": 2, "per_device_train_batch_size": 2, "save_strategy": "no",
        "gradient_accumulation_steps": 2, "logging_steps": 3, "learning_rate": 1e-2, "disable_tqdm": True,
    }  # fmt: skip
    args = SFTConfig(**{**wanted, **values})
    evaluates = args.eval_strategy != "no"
    return SFTTrainer(
        model=folder, args=args, train_dataset=rows, eval_dataset=ROWS[:3] if evaluates else None,
        peft_config=config or lora(), processing_class=tiny_tokenizer(),
    )  # fmt: skip


def flat(value: Any) -> list[Any]:
    """The leaves of an optimizer's state, tensors as they are."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value, key=str) for leaf in (key, *flat(value[key]))]
    return [leaf for item in value for leaf in flat(item)] if isinstance(value, list | tuple) else [value]


TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second",
         "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "tokens_per_second"}  # fmt: skip


def logged(trainer: SFTTrainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in trainer.state.log_history]


def assert_same(straight: Any, again: Any) -> None:
    """Of two trainers that have run."""
    a, b = (dict(t.model.named_parameters()) for t in (straight, again))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    a, b = (flat(t.optimizer.state_dict()) for t in (straight, again))
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert logged(again) == logged(straight)
