"""A short run that is evaluated while it trains: a tiny chat model, adapters with dropout, rows of several lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinychat import tiny_model, tiny_tokenizer

from deltaw import LoraConfig, SFTConfig, SFTTrainer

ROWS = [{"prompt": f"say {i}: ", "completion": "ab" * (1 + i % 4)} for i in range(11)]  # no batch size divides it


def trainer_of(where: Path, **values: Any) -> SFTTrainer:
    given = {name: values.pop(name) for name in ("eval_dataset", "callbacks", "compute_metrics") if name in values}
    settings: dict[str, Any] = {
        "output_dir": str(where), "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1,
        "per_device_eval_batch_size": 4, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(**{**settings, **values}),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"),
        **{"eval_dataset": ROWS, **given},
    )
