"""The demo's training job, side by side: TRL + PEFT as a user would write it, and deltaw.

    python benchmarks/sft_job.py [--steps 12] [--rounds 2]

Each contestant runs the job in a process of its own, in turns: text-to-SQL rows, SmolLM2-135M in bfloat16 on the CPU,
rank 16 on all linear layers, 16 examples a step, no activation checkpointing, rows in one fixed order. Reported are
the seconds of a step (the first is left out), tokens a second, the peak of anonymous memory above the loaded model, and
the losses step by step. "deltaw, float32" shows where the losses would go without rounding; it is not timed.
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

CONTESTANTS = ["TRL + PEFT", "deltaw", "deltaw, float32"]
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


def settings(args: argparse.Namespace, folder: str) -> dict[str, Any]:
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
        if name == "TRL + PEFT":
            import trl
            from datasets import Dataset
            from peft import LoraConfig as PeftLoraConfig

            trainer: Any = trl.SFTTrainer(
                model=model,
                args=trl.SFTConfig(**settings(args, folder), gradient_checkpointing=False),
                train_dataset=Dataset.from_list(rows),
                peft_config=PeftLoraConfig(**LORA),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        else:
            from deltaw import LoraConfig, SFTConfig, SFTTrainer

            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(**settings(args, folder)),
                train_dataset=rows,
                peft_config=LoraConfig(**LORA),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        with PeakMemory() as memory:
            trainer.train()
    return {
        "name": name,
        "seconds": clock.seconds[1:],
        "losses": clock.losses,
        "norms": clock.norms,
        "peak": memory.above / 2**20,
        "tokens": sum(lengths[args.batch : args.steps * args.batch]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contestant, in turns")
    parser.add_argument("--job", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    resolve_model("smollm2-135m")
    if args.job:
        print(json.dumps(job(args.job, args)))
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    options = ["--steps", str(args.steps), "--batch", str(args.batch)]
    for turn in range(args.rounds):
        for name in CONTESTANTS:
            if "float32" in name and turn:
                continue
            print(f"round {turn + 1}: {name}", file=sys.stderr)
            runs[name].append(own_process(__file__, "--job", name, *options))
    timed = [name for name in CONTESTANTS if "float32" not in name]
    seconds = {name: [s for run in runs[name] for s in run["seconds"]] for name in timed}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: statistics.median(run["peak"] for run in runs[name]) for name in timed}
    first = timed[0]
    rows = [
        [
            name,
            spread(seconds[name], 2),
            f"{sum(run['tokens'] for run in runs[name]) / sum(seconds[name]):.0f}",
            f"{middle[first] / middle[name]:.2f}",
            f"{peaks[name]:.0f}",
            f"{peaks[name] / peaks[first]:.2f}",
        ]
        for name in timed
    ]
    print(f"\nText-to-SQL, {args.batch} examples a step, {args.steps} steps, {args.rounds} runs each\n{machine()}\n")
    head = ["job", "seconds a step (min to max)", "tokens/s", "TRL / it", "peak MiB above the model", "it / TRL"]
    print(table(head, rows))
    print("\nLoss (gradient norm) step by step:\n")
    steps = range(len(runs[first][0]["losses"]))
    body = [
        [str(i + 1), *(f"{runs[n][0]['losses'][i]:.3f} ({runs[n][0]['norms'][i]:.2f})" for n in CONTESTANTS)]
        for i in steps
    ]
    print(table(["step", *CONTESTANTS], body))


if __name__ == "__main__":
    main()
