"""What the trainer adds to a step: SFTTrainer beside a bare loop, in turns within one run.

    python benchmarks/trainer_overhead.py [--rounds 21] [--batch 4] [--length 256] [--logging-steps 10]

SmolLM2-135M in bfloat16, rank 16 on all linear layers, every token supervised. After each of the trainer's steps the
bare one is made with the same model and batch: the gradients are cleared, forward and backward through
``causal_lm_loss``, then clipping and AdamW (at rate 0, so that the trainer's weights stay its own). The trainer's step
is all the time between two bare ones: batch, loss, backward, its checks, clipping, optimizer, schedule, callbacks, and
a log line where it is due.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import machine, spread, table
from train_step import batch
from transformers import TrainerCallback

from deltaw import LoraConfig, SFTConfig, SFTTrainer, causal_lm_loss
from deltaw.loading import load_model
from deltaw.train.progress import ProgressCallback

WARMUP = 2


class InTurns(TrainerCallback):
    """Makes a bare step after each of the trainer's, and times both."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.trainer: list[float] = []
        self.passes: list[float] = []
        self.update: list[float] = []
        self.left = 0.0

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=0.0, fused=True)
        self.left = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        entered = time.perf_counter()
        self.optimizer.zero_grad()
        causal_lm_loss(model, **self.data).backward()
        passed = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        updated = time.perf_counter()
        self.optimizer.zero_grad()
        if state.global_step > WARMUP:
            self.trainer.append(entered - self.left)
            self.passes.append(passed - entered)
            self.update.append(updated - passed)
        self.left = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--logging-steps", type=int, default=10)
    args = parser.parse_args()
    args.supervised = 1.0
    data = batch(args)
    labels = data["labels"].clone()
    labels[:, 0] = -100
    rows = [
        {"input_ids": ids.tolist(), "labels": learned.tolist()}
        for ids, learned in zip(data["input_ids"], labels, strict=True)
    ]
    turns = InTurns(data)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=load_model("smollm2-135m", dtype=torch.bfloat16),
            args=SFTConfig(
                folder,
                max_steps=args.rounds + WARMUP,
                per_device_train_batch_size=args.batch,
                logging_steps=args.logging_steps,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[turns, ProgressCallback(sys.stderr, live=False)],
        )
        trainer.train()
    bare = [a + b for a, b in zip(turns.passes, turns.update, strict=True)]
    ratios = [a / b for a, b in zip(turns.trainer, bare, strict=True)]
    print(f"\nThe trainer beside a bare loop, {args.batch} x {args.length}, {args.rounds} rounds\n{machine()}\n")
    body = [
        ["forward and backward", spread(turns.passes)],
        ["the same, clipping and AdamW", spread(bare)],
        ["the trainer's step", spread(turns.trainer)],
        ["trainer / bare, in pairs", spread(ratios)],
    ]
    print(table(["", "seconds (min to max)"], body))
    print(f"\nmedian of the pairs: {100 * (statistics.median(ratios) - 1):+.1f}%")


if __name__ == "__main__":
    main()
