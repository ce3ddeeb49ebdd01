"""A batch of eight rows through eight adapters beside the same batch through one: what mixing costs.

    python benchmarks/mixed.py [--dtype bf16|fp32] [--rounds 7] [--adapters 8] [--supervised 0.3]

All contestants have the same weights, adapters (one seed) and tokens, and take turns in one process. A step is forward
and backward with the fast loss over the share of tokens that is supervised. Forward alone is timed beside it, without a
head but for one token a row, where PEFT mixes too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from common import in_turns, machine, spread, table

from deltaw import load_model
from deltaw.adapters import BASE

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS, LENGTH = 8, 128
ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def make(library: Any, args: argparse.Namespace) -> Any:
    """A model with the adapters, all of them trainable, the first one active."""
    base: Any = load_model("smollm2-135m", dtype=DTYPES[args.dtype])
    torch.manual_seed(1)
    model = library.get_peft_model(base, library.LoraConfig(**ADAPTER), adapter_name="task0")
    for index in range(1, args.adapters):
        model.add_adapter(f"task{index}", library.LoraConfig(**ADAPTER))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # away from zero, so that every gradient has something to do
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.set_requires_grad([f"task{index}" for index in range(args.adapters)])
    return model


def contestants(args: argparse.Namespace) -> tuple[dict[str, Callable[[], float]], dict[str, Callable[[], float]]]:
    """(steps, forwards) by name; each returns a number that shows that they compute the same."""
    import deltaw

    ids = torch.randint(0, 49152, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ours = make(deltaw, args)
    one_each = [f"task{row * args.adapters // ROWS}" for row in range(ROWS)]
    turns = [f"task{row % args.adapters}" for row in range(ROWS)]

    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) >= args.supervised] = -100

    def step(model: Any, **names: Any) -> Callable[[], float]:
        def run() -> float:
            for parameter in model.parameters():
                parameter.grad = None
            loss = deltaw.causal_lm_loss(model, input_ids=ids, labels=labels, **names)
            loss.backward()
            return float(loss.detach())

        return run

    def forward(model: Any, **names: Any) -> Callable[[], float]:
        def run() -> float:
            with torch.no_grad():
                logits = model(input_ids=ids, logits_to_keep=1, **names).logits
                return float(logits.float().square().mean())

        return run

    ways: dict[str, dict[str, Any]] = {
        "one adapter": {},
        "one adapter, by name": {"adapter_names": ["task0"] * ROWS},
        f"{args.adapters} adapters": {"adapter_names": one_each},
        "one row of the base": {"adapter_names": [BASE, *one_each[1:]]},
    }
    if args.adapters < ROWS:
        ways[f"{args.adapters} adapters in turns"] = {"adapter_names": turns}
    steps = {name: step(ours, **names) for name, names in ways.items()}
    forwards = {name: forward(ours, **names) for name, names in ways.items()}
    try:
        import peft
    except ImportError:
        return steps, forwards
    theirs = make(peft, args)
    theirs.eval()  # it refuses to mix in training
    forwards["PEFT, one adapter"] = forward(theirs)
    forwards[f"PEFT, {args.adapters} adapters"] = forward(theirs, adapter_names=one_each)
    return steps, forwards


def show(title: str, calls: dict[str, Callable[[], float]], rounds: int) -> None:
    results = {name: call() for name, call in calls.items()}
    seconds = in_turns(calls, rounds)
    first = statistics.median(seconds["one adapter"])
    rows = [
        [name, spread(values), f"{statistics.median(values) / first:.3f}", f"{results[name]:.4f}"]
        for name, values in seconds.items()
    ]
    print(f"\n{title}\n")
    print(table(["batch", "seconds (min to max)", "it / one adapter", "result"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--adapters", type=int, default=8, choices=(2, 4, 8))
    parser.add_argument("--supervised", type=float, default=0.3, help="share of tokens with a loss (%(default)s)")
    args = parser.parse_args()
    steps, forwards = contestants(args)
    print(f"\nSmolLM2-135M, {args.dtype}, rank 16 on all linear layers, batch {ROWS} x {LENGTH}; {args.rounds} rounds")
    print(machine())
    show("Forward and backward", steps, args.rounds)
    show("Forward alone", forwards, args.rounds)


if __name__ == "__main__":
    main()
