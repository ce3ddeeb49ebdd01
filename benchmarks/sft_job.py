"""The demo's training job, side by side: TRL + PEFT as a user would write it, and deltaw, each in its modes.

    python benchmarks/sft_job.py [--steps 12] [--rounds 2] [--only NAME ...]

Each contestant runs the job in a process of its own, in turns: text-to-SQL rows, SmolLM2-135M in bfloat16 on the CPU,
rank 16 on all linear layers, 16 examples a step, no activation checkpointing. Rows come in one fixed order, but for "by
length", which is TRL with train_sampling_strategy="group_by_length". Reported are the seconds of a step (the first is
left out), real tokens a second (padding does not count), the peak of anonymous memory above the loaded model, and the
losses by tokens seen. "deltaw, float32" shows where the losses would go without rounding; it is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from common import PeakMemory, machine, own_process, spread, table
from transformers import TrainerCallback

from deltaw.loading import load_model, load_tokenizer, resolve_model
from text_to_sql.build import build

#: contestant -> what differs in its settings
CONTESTANTS: dict[str, dict[str, Any]] = {
    "TRL + PEFT": {},
    "TRL + PEFT, by length": {"train_sampling_strategy": "group_by_length"},
    "deltaw, padded": {},
    "deltaw, padding-free": {"padding_free": True},
    "deltaw, padding-free, compiled": {"padding_free": True, "torch_compile": True},
    "deltaw, float32": {},
}
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Clock(TrainerCallback):
    """Seconds of each optimizer step, and the losses that were logged."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))


class Counting:
    """A collator that counts the real tokens of each batch."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.tokens = inner, []

    def __call__(self, features: Any) -> Any:
        batch = self.inner(features)
        mask = batch.get("attention_mask")
        self.tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch


def settings(name: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": args.dtype == "bf16",
        "seed": 0,
        **CONTESTANTS[name],
    }


def job(name: str, args: argparse.Namespace) -> dict[str, Any]:
    rows = [
        {"prompt": r["prompt"], "completion": r["completion"]} for r in build(0, args.steps * args.batch, 0)["train"]
    ]
    tokenizer = load_tokenizer("smollm2-135m")
    args.dtype = "fp32" if "float32" in name else "bf16"
    model: Any = load_model("smollm2-135m", dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype])
    with torch.no_grad():
        model(input_ids=torch.arange(64).unsqueeze(0))  # faults the weights in
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("TRL"):
            import trl
            from datasets import Dataset
            from peft import LoraConfig as PeftLoraConfig

            trainer: Any = trl.SFTTrainer(
                model=model,
                args=trl.SFTConfig(**settings(name, args, folder), gradient_checkpointing=False),
                train_dataset=Dataset.from_list(rows),
                peft_config=PeftLoraConfig(**LORA),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        else:
            from deltaw import LoraConfig, SFTConfig, SFTTrainer

            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(**settings(name, args, folder)),
                train_dataset=rows,
                peft_config=LoraConfig(**LORA),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        counting = trainer.data_collator = Counting(trainer.data_collator)
        with PeakMemory() as memory:
            trainer.train()
    return {
        "name": name,
        "seconds": clock.seconds[1:],
        "losses": clock.losses,
        "norms": clock.norms,
        "peak": memory.above / 2**20,
        "tokens": counting.tokens[: args.steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contestant, in turns")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="these contestants alone")
    parser.add_argument("--job", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    resolve_model("smollm2-135m")
    if args.job:
        print(json.dumps(job(args.job, args)))
        return
    names = args.only or list(CONTESTANTS)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    options = ["--steps", str(args.steps), "--batch", str(args.batch)]
    for turn in range(args.rounds):
        for name in names:
            if "float32" in name and turn:
                continue
            print(f"round {turn + 1}: {name}", file=sys.stderr)
            runs[name].append(own_process(__file__, "--job", name, *options))
    timed = [name for name in names if "float32" not in name]
    seconds = {name: [s for run in runs[name] for s in run["seconds"]] for name in timed}
    # each step at its median over the rounds: a neighbour on the machine slows some of them
    rates = {name: rate(runs[name]) for name in timed}
    peaks = {name: statistics.median(run["peak"] for run in runs[name]) for name in timed}
    peers = [name for name in timed if name.startswith("TRL")] or timed[:1]
    fastest = max(peers, key=lambda name: rates[name])
    rows = [
        [
            name,
            spread(seconds[name], 2),
            f"{rates[name]:.0f}",
            f"{rates[name] / rates[fastest]:.2f}",
            f"{peaks[name]:.0f}",
            f"{peaks[name] / peaks[fastest]:.2f}",
        ]
        for name in timed
    ]
    print(f"\nText-to-SQL, {args.batch} examples a step, {args.steps} steps, {args.rounds} runs each\n{machine()}\n")
    head = [
        "job",
        "seconds a step (min to max)",
        "tokens/s",
        "it / TRL's faster",
        "peak MiB above the model",
        "it / that",
    ]
    print(table(head, rows))
    print("\nTokens seen, and the loss of the next step (gradient norm):\n")
    body = []
    for i in range(args.steps):
        row = [str(i + 1)]
        for name in names:
            run = runs[name][0]
            row.append(f"{sum(run['tokens'][:i])}: {run['losses'][i]:.3f} ({run['norms'][i]:.2f})")
        body.append(row)
    print(table(["step", *names], body))


def rate(runs: list[dict[str, Any]]) -> float:
    """Real tokens a second, the first step left out."""
    middle = [statistics.median(step) for step in zip(*(run["seconds"] for run in runs), strict=True)]
    return sum(runs[0]["tokens"][1:]) / sum(middle)


if __name__ == "__main__":
    main()
