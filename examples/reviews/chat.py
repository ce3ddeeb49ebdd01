"""Classification through a chat model: the likelier of two answers, before training and after it.

Knows nothing of the reviews' file or of other models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback

from deltaw import LoraConfig, SFTConfig, SFTTrainer
from deltaw.data import IGNORE, Collator, render
from deltaw.evaluate.generate import inference
from deltaw.train.progress import ProgressCallback

from .data import LABELS, Review

__all__ = ["RECIPE", "chat_row", "label_by_likelihood", "train_chat"]

INSTRUCTION = "Is this line from a film review fresh (it recommends the film) or rotten? Answer with one word."

#: fields of LoraConfig and of SFTConfig
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "use_rslora": True, "target_modules": "all-linear"}
RECIPE: dict[str, Any] = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "group_by_length",
}


def chat_row(review: Review, label: int) -> dict[str, Any]:
    """The review as a question, and ``label`` as its answer."""
    return {
        "prompt": [{"role": "user", "content": f"{INSTRUCTION}\n\n{review.text}"}],
        "completion": [{"role": "assistant", "content": LABELS[label]}],
    }


@torch.no_grad()
def label_by_likelihood(
    model: Any,
    tokenizer: Any,
    reviews: Sequence[Review],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], object] | None = None,
) -> list[int]:
    """The label whose answer, with the end of its turn, the model finds likelier.

    Args:
        batch_size: (review, label) pairs in one forward pass.
        progress: called with (pairs done, all pairs).
    """
    device = next(model.parameters()).device
    rendered = [render(chat_row(one, label), tokenizer) for one in reviews for label in range(len(LABELS))]
    order = sorted(range(len(rendered)), key=lambda i: -len(rendered[i].input_ids))
    found = torch.zeros(len(rendered), dtype=torch.float64)
    collate = Collator(pad_token_id=0)  # padding is masked, so any id will do
    with inference(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {
                key: value.to(device) for key, value in collate([rendered[i].as_features() for i in chosen]).items()
            }
            targets = batch["labels"][:, 1:]  # (batch, length - 1): position t predicts token t + 1
            rows = targets != IGNORE
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            losses = torch.zeros(rows.shape, dtype=torch.float64, device=device)
            losses[rows] = cross_entropy(logits[rows].float(), targets[rows], reduction="none").double()
            found[chosen] = -losses.sum(1).cpu()
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return found.view(len(reviews), len(LABELS)).argmax(1).tolist()


def train_chat(
    model: Any, tokenizer: Any, train: Sequence[Review], *, steps: int, seed: int, base: str, output: Path, quiet: bool
) -> Any:
    """Puts LoRA on the chat model and trains it to answer with the label; the loss is on the answer alone.

    Raises:
        DeltawError: whatever the trainer finds wrong.
    """
    progress = ProgressCallback(sys.stderr, quiet=quiet)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            warmup_steps=steps // 20,
            seed=seed,
            save_strategy="no",
            disable_tqdm=True,
            **RECIPE,
        ),
        train_dataset=[chat_row(one, one.label) for one in train],
        processing_class=tokenizer,
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM", base_model_name_or_path=base),
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        progress.close()
    return trainer.model
