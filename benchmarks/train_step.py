"""One training step, side by side: PEFT, deltaw, deltaw compiled, the frozen model, and the arithmetic limit.

    python benchmarks/train_step.py [--dtype bf16|fp32] [--supervised 1.0] [--rounds 7]
    python benchmarks/train_step.py --memory        # peak memory, each contestant in a process of its own

All contestants have the same weights, the same adapters (one seed) and the same batch, and take turns in one process.
A step is forward and backward; losses and gradient norms are printed, since a fast step with a wrong gradient is none.
"frozen" is the bare model with the same supervised-row loss and a gradient at its input embeddings, so that backward
runs through every layer: what training costs before any adapter. "limit" is the matrix products of that floor and of
the adapters at the rates this process measures on the model's own shapes: no step can be faster by rearranging it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from common import PeakMemory, in_turns, machine, own_process, spread, table
from torch import Tensor

from deltaw import LoraConfig, causal_lm_loss, get_peft_model, load_model
from deltaw.loading import resolve_model
from deltaw.ops import supervised_cross_entropy
from deltaw.train.fast import compile_layers, fast_blocks
from deltaw.weights import store_of

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ADAPTER: dict[str, Any] = {"lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

Step = Callable[[], Tensor]


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """Random tokens; a share of them supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (args.batch, args.length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=generator) >= args.supervised] = -100
    return {"input_ids": ids, "labels": labels}


def nudge(model: torch.nn.Module) -> None:
    """B away from zero, alike for everyone, so that every gradient has something to do."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


def make(name: str, args: argparse.Namespace) -> tuple[Step, torch.nn.Module]:
    """The forward of a contestant (returns its loss) and its model."""
    data = batch(args)
    base: Any = load_model("smollm2-135m", dtype=DTYPES[args.dtype])
    torch.manual_seed(1)
    if name == "PEFT":
        import peft

        model: Any = peft.get_peft_model(base, peft.LoraConfig(r=args.rank, **ADAPTER))
        nudge(model)
        return (lambda: model(**data).loss), model
    if name.startswith("frozen"):
        base.requires_grad_(False)
        base.enable_input_require_grads()

        def floor() -> Tensor:
            hidden = base.model(input_ids=data["input_ids"], use_cache=False).last_hidden_state[:, :-1]
            return supervised_cross_entropy(hidden, data["labels"][:, 1:], store_of(base.lm_head))

        if name == "frozen":
            return floor, base

        def fast_floor() -> Tensor:
            with fast_blocks(base):
                return floor()

        return fast_floor, base
    model = get_peft_model(base, LoraConfig(r=args.rank, **ADAPTER))
    nudge(model)
    if name == "deltaw":
        return (lambda: causal_lm_loss(model, **data)), model
    compile_layers(base)

    def compiled() -> Tensor:
        with fast_blocks(base, modules=False):
            return causal_lm_loss(model, **data)

    return compiled, model


def step_of(forward: Step, model: torch.nn.Module) -> Callable[[], float]:
    def step() -> float:
        for parameter in model.parameters():
            parameter.grad = None
        loss = forward()
        loss.backward()
        return float(loss.detach())

    return step


def gradient_norm(model: torch.nn.Module) -> float:
    grads = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(grads).norm()) if grads else 0.0


def limit(args: argparse.Namespace, supervised: int) -> float:
    """Seconds of the products no step can avoid, at the best rate measured for each shape (median of 9 calls)."""
    base: Any = load_model("smollm2-135m", dtype=DTYPES[args.dtype])
    rows = args.batch * args.length
    total = 0.0
    cache: dict[tuple[int, int, int], float] = {}

    def product(n: int, k: int, m: int) -> float:
        if (n, k, m) not in cache:
            left, right = torch.randn(n, k).to(DTYPES[args.dtype]), torch.randn(k, m).to(DTYPES[args.dtype])
            out = torch.empty(n, m, dtype=DTYPES[args.dtype])
            times = []
            for _ in range(11):
                started = time.perf_counter()
                torch.mm(left, right, out=out)
                times.append(time.perf_counter() - started)
            cache[n, k, m] = statistics.median(times[2:])
        return cache[n, k, m]

    layers = [m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    for layer in layers:
        wide, narrow, r = layer.out_features, layer.in_features, args.rank
        total += product(rows, narrow, wide) + product(rows, wide, narrow)  # y, dx
        total += 2 * (product(rows, narrow, r) + product(rows, r, wide))  # low, up; and their like in backward
        total += product(r, rows, narrow) + product(wide, rows, r)  # dA, dB
    head = base.lm_head
    total += product(supervised, head.in_features, head.out_features)
    total += product(supervised, head.out_features, head.in_features)
    return total


CONTESTANTS = ["PEFT", "deltaw", "deltaw compiled", "frozen", "frozen, our blocks"]


def times(args: argparse.Namespace) -> None:
    names = [name for name in CONTESTANTS if not (args.eager and "compiled" in name)]
    made = {name: make(name, args) for name in names}
    steps = {name: step_of(*pair) for name, pair in made.items()}
    losses, norms = {}, {}
    for name, step in steps.items():
        started = time.perf_counter()
        losses[name] = step()
        norms[name] = gradient_norm(made[name][1])
        print(f"{name}: first step {time.perf_counter() - started:.1f} s", file=sys.stderr)
    seconds = in_turns(steps, args.rounds)
    floor = limit(args, int((batch(args)["labels"][:, 1:] != -100).sum()))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        [
            name,
            spread(seconds[name]),
            f"{middle['PEFT'] / middle[name]:.2f}",
            f"{middle[name] / middle['frozen']:.2f}",
            f"{floor / middle[name]:.0%}",
            f"{losses[name]:.4f}",
            f"{norms[name]:.4f}" if norms[name] else "-",
        ]
        for name in names
    ]
    rows.append(
        [
            "limit",
            f"{floor:.3f}",
            f"{middle['PEFT'] / floor:.2f}",
            f"{floor / middle['frozen']:.2f}",
            "100%",
            "",
            "",
        ]
    )
    print(
        f"\nSmolLM2-135M, {args.dtype}, rank {args.rank}, batch {args.batch} x {args.length}, "
        f"{args.supervised:.0%} supervised; {args.rounds} rounds\n{machine()}\n"
    )
    print(
        table(
            [
                "step",
                "seconds (min to max)",
                "PEFT / it",
                "it / frozen",
                "of the limit",
                "loss",
                "gradient norm",
            ],
            rows,
        )
    )


def memory_of(args: argparse.Namespace) -> None:
    """Peak anonymous memory of one step above what the loaded model takes; printed as JSON."""
    forward, model = make(args.memory_of, args)
    with torch.no_grad():
        forward()  # faults the weights in
    if "compiled" in args.memory_of:
        step_of(forward, model)()  # compiling takes memory of its own, once
        for parameter in model.parameters():
            parameter.grad = None
    with PeakMemory() as memory:
        loss = step_of(forward, model)()
    print(json.dumps({"name": args.memory_of, "peak": memory.above, "loss": loss, "norm": gradient_norm(model)}))


def memory(args: argparse.Namespace) -> None:
    names = [name for name in CONTESTANTS if not (args.eager and "compiled" in name)]
    options = ["--dtype", args.dtype, "--supervised", str(args.supervised), "--rank", str(args.rank)]
    options += ["--batch", str(args.batch), "--length", str(args.length)]
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            peaks[name].append(own_process(__file__, "--memory-of", name, *options)["peak"] / 2**20)
    middle = {name: statistics.median(values) for name, values in peaks.items()}
    rows = [[name, spread(peaks[name], 0), f"{middle[name] / middle['PEFT']:.2f}"] for name in names]
    print(
        f"\nPeak memory of a step above the loaded model, {args.dtype}, batch {args.batch} x {args.length}, "
        f"{args.supervised:.0%} supervised; {args.rounds} processes each\n{machine()}\n"
    )
    print(table(["step", "MiB (min to max)", "it / PEFT"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--supervised", type=float, default=1.0, help="share of the tokens that carry a loss")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--eager", action="store_true", help="leave the compiled step out (compiling takes a minute)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    resolve_model("smollm2-135m")
    if args.memory_of:
        memory_of(args)
    elif args.memory:
        memory(args)
    else:
        times(args)


if __name__ == "__main__":
    main()
