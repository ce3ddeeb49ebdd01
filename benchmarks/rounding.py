"""What bfloat16 rounding does to a run: PEFT in bfloat16, deltaw in bfloat16, and deltaw in float32, step by step.

    python benchmarks/rounding.py [--steps 10] [--batch 8]

The three train on the same batches with the same labels, the same adapters at the start (one seed), the same optimizer
and the model's own loss, so that nothing is left to differ but where sums are rounded. The float32 run shows where the
losses would go without rounding. Nothing is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from common import machine, table
from torch import Tensor

import deltaw
from deltaw.data import Collator, render_all
from text_to_sql.build import build

LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
WARMUP = 3


def batches(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Rows of text-to-SQL, supervised on the completion."""
    tokenizer = deltaw.load_tokenizer("smollm2-135m")
    rows = build(0, args.steps * args.batch, 0)["train"]
    features = [one.as_features() for one in render_all(rows, tokenizer)]
    collate = Collator(pad_token_id=0)
    return [collate(features[i : i + args.batch]) for i in range(0, len(features), args.batch)]


def losses(who: str, data: list[dict[str, Tensor]], rate: float) -> list[float]:
    """The loss of each step of one contestant."""
    dtype = torch.float32 if "float32" in who else torch.bfloat16
    base: Any = deltaw.load_model("smollm2-135m", dtype=dtype)
    torch.manual_seed(0)
    if "PEFT" in who:
        import peft

        model: Any = peft.get_peft_model(base, peft.LoraConfig(**LORA))
    else:
        model = deltaw.get_peft_model(base, deltaw.LoraConfig(**LORA))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    found = []
    for step, batch in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
        print(f"{who}: step {step + 1}/{len(data)}  loss {found[-1]:.3f}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    data = batches(args)
    names = ["PEFT, bfloat16", "deltaw, bfloat16", "deltaw, float32"]
    runs = {name: losses(name, data, args.learning_rate) for name in names}
    exact = runs[names[-1]]
    print(f"\nText-to-SQL, {args.batch} examples a step, learning rate {args.learning_rate:g}\n{machine()}\n")
    rows = []
    for step, loss in enumerate(exact):
        rounded = [runs[name][step] for name in names[:-1]]
        rows.append([str(step + 1), *(f"{one:.3f} ({one / loss - 1:+.1%})" for one in rounded), f"{loss:.3f}"])
    print(table(["step", *(f"{name} (against float32)" for name in names[:-1]), names[-1]], rows))


if __name__ == "__main__":
    main()
