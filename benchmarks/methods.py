"""What each method costs over LoRA, ours beside PEFT's: a training step, its peak memory, merging, a switch.

    python benchmarks/methods.py [--methods dora lokr ...] [--rounds 5] [--model NAME_OR_FOLDER]
    python benchmarks/methods.py --memory [--methods ...]     # peak memory, each contestant in a process of its own
    python benchmarks/methods.py --merge                      # all adapters merged, unmerged, and one for another

A method is compared with LoRA at rank 16 of its own library: four contestants (LoRA and the method, deltaw and PEFT)
with the same weights, one seed and the same batch take turns in one process. A step is forward and backward and, for
AdaLoRA, its penalty and its allocation. Losses and gradient norms are printed, since a fast step with a wrong gradient
is none. The ratios aimed at stand beside those measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from common import PeakMemory, in_turns, machine, own_process, spread, table
from torch import Tensor

import deltaw
from deltaw import causal_lm_loss, load_model

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COMMON: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
STEPS = 1000  # of AdaLoRA's schedule; the steps measured lie where it prunes
LIBRARIES = ("deltaw", "PEFT")


class Contest(NamedTuple):
    """A method in the contest: its config class and fields, and the largest ratio to LoRA's step aimed at."""

    config: str
    fields: dict[str, Any]
    aim: float | None
    peft: float | None  # what PEFT's was measured at when the aim was set


METHODS = {
    "lora": Contest("LoraConfig", {"r": 16, "lora_alpha": 32}, None, None),
    "dora": Contest("LoraConfig", {"r": 16, "lora_alpha": 32, "use_dora": True}, 1.10, 1.35),
    "adalora": Contest(
        "AdaLoraConfig", {"init_r": 16, "target_r": 8, "lora_alpha": 32, "total_step": STEPS, "tfinal": 100}, 1.06, 1.06
    ),
    "lokr": Contest("LoKrConfig", {"r": 16, "alpha": 32}, 1.20, 2.05),
    "loha": Contest("LoHaConfig", {"r": 8, "alpha": 16}, 1.50, 2.30),
    # a randomized SVD, so that starting takes seconds; the step is that of any PiSSA
    "pissa": Contest("LoraConfig", {"r": 16, "lora_alpha": 16, "init_lora_weights": "pissa_niter_4"}, None, None),
}


def peer() -> Any:
    import peft

    return peft


def make(library: str, method: str, args: argparse.Namespace, names: tuple[str, ...] = ("default",)) -> Any:
    """The base with adapters ``names`` of ``method`` on it, by ``library``; zero factors are nudged away from zero."""
    base: Any = load_model(args.model, dtype=DTYPES[args.dtype])
    contest, maker = METHODS[method], deltaw if library == "deltaw" else peer()
    config: Callable[..., Any] = getattr(maker, contest.config)
    torch.manual_seed(1)
    model: Any = maker.get_peft_model(base, config(**contest.fields, **COMMON), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(**contest.fields, **COMMON))
    nudge(model)
    return model.train()


@torch.no_grad()
def nudge(model: torch.nn.Module) -> None:
    """Factors that begin at zero get 0.01 N(0, 1), alike for parameters of equal names, so that every gradient has
    something to do."""
    for name, parameter in model.named_parameters():
        if any(f".{mark}" in name for mark in ("lora_", "hada_", "lokr_")) and not parameter.any():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


def batch(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Random tokens, every one supervised."""
    vocabulary = model.get_base_model().config.vocab_size
    ids = torch.randint(0, vocabulary, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def step_of(library: str, method: str, model: Any, args: argparse.Namespace) -> Callable[[], float]:
    """One step of ``model``; returns its loss, AdaLoRA's penalty included."""
    data, made = batch(model, args), 0
    allocates = METHODS[method].config == "AdaLoraConfig"

    def forward() -> Tensor:
        return model(**data).loss if library == "PEFT" else causal_lm_loss(model, **data)

    def step() -> float:
        nonlocal made
        for parameter in model.parameters():
            parameter.grad = None
        loss = forward()
        loss.backward()
        if allocates:
            made += 1
            model.base_model.update_and_allocate(made)
        return float(loss.detach())

    return step


def gradient_norm(model: torch.nn.Module) -> float:
    return float(torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm())


# --- a step -------------------------------------------------------------------------------------------------


def times(args: argparse.Namespace) -> None:
    """One table over the methods: seconds of a step, and what they are of the same library's LoRA."""
    rows = []
    for method in args.methods:
        made, losses, norms = {}, {}, {}
        for library in LIBRARIES:
            for which in ("lora", method):
                began = time.perf_counter()
                model = make(library, which, args)
                made[library, which] = step_of(library, which, model, args), model
                print(f"{library} {which}: made in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        for key, (step, model) in made.items():
            losses[key], norms[key] = step(), gradient_norm(model)
        seconds = in_turns({" ".join(key): step for key, (step, _) in made.items()}, args.rounds)
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        contest = METHODS[method]
        for library in LIBRARIES:
            own, lora = f"{library} {method}", f"{library} lora"
            key = (library, method)
            aim = contest.aim if library == "deltaw" else contest.peft
            ratios = [a / b for a, b in zip(seconds[own], seconds[lora], strict=True)]  # within a round
            rows.append(
                [
                    method,
                    library,
                    spread(seconds[own]),
                    spread(seconds[lora]),
                    spread(ratios, 2),
                    "-" if aim is None else f"{'at most ' if library == 'deltaw' else ''}{aim:.2f}",
                    f"{middle[f'PEFT {method}'] / middle[own]:.2f}",
                    f"{losses[key]:.4f}",
                    f"{norms[key]:.4f}",
                ]
            )
        del made
    print(f"\n{head(args)}; {args.rounds} rounds\n{machine()}\n")
    print(
        table(
            ["method", "by", "seconds", "its LoRA", "of its LoRA", "aim", "PEFT / it", "loss", "gradient norm"],
            rows,
        )
    )


def head(args: argparse.Namespace) -> str:
    return f"{Path(args.model).name}, {args.dtype}, batch {args.batch} x {args.length}; LoRA at rank 16"


# --- memory -------------------------------------------------------------------------------------------------


def memory_of(library: str, method: str, args: argparse.Namespace) -> None:
    """Peak anonymous memory of one step above what the adapted model takes; printed as JSON."""
    model = make(library, method, args)
    step = step_of(library, method, model, args)
    with torch.no_grad():
        model(input_ids=batch(model, args)["input_ids"])  # faults the weights in
    with PeakMemory() as memory:
        loss = step()
    print(json.dumps({"peak": memory.above, "loss": loss, "norm": gradient_norm(model)}))


def memory(args: argparse.Namespace) -> None:
    """One table over the methods: peak memory of a step, and what it is of the same library's LoRA."""
    options = ["--dtype", args.dtype, "--batch", str(args.batch), "--length", str(args.length), "--model", args.model]
    peaks: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for method in dict.fromkeys(["lora", *args.methods]):
            for library in LIBRARIES:
                told = own_process(__file__, "--memory-of", library, method, *options)
                peaks.setdefault((method, library), []).append(told["peak"] / 2**20)
    middle = {key: statistics.median(values) for key, values in peaks.items()}
    rows = [
        [
            method,
            library,
            spread(values, 0),
            f"{middle[method, library] / middle['lora', library]:.2f}",
            f"{middle[method, library] / middle[method, 'PEFT']:.2f}",
        ]
        for (method, library), values in peaks.items()
    ]
    print(f"\nPeak memory of a step above the adapted model; {head(args)}; {args.rounds} processes each\n{machine()}\n")
    print(table(["method", "by", "MiB (min to max)", "of its LoRA", "it / PEFT"], rows))


# --- merging ------------------------------------------------------------------------------------------------


def merging(args: argparse.Namespace) -> None:
    """Two adapters on every linear layer: all of one merged, taken out, and one exchanged for the other."""
    models = {library: make(library, "lora", args, names=("a", "b")).eval() for library in LIBRARIES}
    weights = {library: base_weights(model) for library, model in models.items()}
    begun = {library: [w.detach().clone() for w in held] for library, held in weights.items()}

    def select(library: str, name: str) -> None:
        models[library].base_model.set_adapter(name)

    seconds: dict[tuple[str, str], list[float]] = {}
    drift: dict[str, float] = {}

    def clocked(act: str, library: str, call: Callable[[], Any], keep: bool) -> None:
        started = time.perf_counter()
        call()
        if keep:
            seconds.setdefault((act, library), []).append(time.perf_counter() - started)

    for turn in range(args.rounds + 1):
        for library, model in models.items():
            counts = turn > 0
            select(library, "a")
            clocked("merge", library, lambda m=model: m.merge_adapter(safe_merge=True), counts)
            clocked("unmerge", library, lambda m=model: m.unmerge_adapter(), counts)
            model.merge_adapter(adapter_names=["a"], safe_merge=True)

            def switch(library: str = library, model: Any = model) -> None:
                model.unmerge_adapter()
                select(library, "b")
                model.merge_adapter(adapter_names=["b"], safe_merge=True)

            clocked("switch", library, switch, counts)
            model.unmerge_adapter()
            changed = [float((w - b).abs().max()) for w, b in zip(weights[library], begun[library], strict=True)]
            drift[library] = max(changed)
            print(f"\rround {turn + 1}/{args.rounds + 1}: {library:<10}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    middle = {key: statistics.median(values) for key, values in seconds.items()}
    rows = [
        [act, library, spread(values), f"{middle[act, 'PEFT'] / middle[act, library]:.2f}"]
        for (act, library), values in seconds.items()
    ]
    rows.sort(key=lambda row: ["merge", "unmerge", "switch"].index(row[0]))
    layers = len(weights["deltaw"])
    print(f"\n{head(args)}; {layers} layers, safe_merge=True; {args.rounds} rounds\n{machine()}\n")
    print(table(["act", "by", "seconds (min to max)", "PEFT / it"], rows))
    told = ", ".join(f"{library} {value:.1e}" for library, value in drift.items())
    print(f"\nLargest change of a base weight after {args.rounds + 1} rounds of merging and unmerging: {told}")


def base_weights(model: Any) -> list[Tensor]:
    """The weights of the layers that carry adapters."""
    return [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = [name for name in METHODS if name != "lora"]
    parser.add_argument("--methods", nargs="+", choices=chosen, default=chosen)
    parser.add_argument("--model", default="smollm2-135m", help="built-in name or folder (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--merge", action="store_true", help="measure merging instead of training")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        library, method = args.memory_of
        memory_of(library, method, args)
    elif args.memory:
        memory(args)
    elif args.merge:
        merging(args)
    else:
        times(args)


if __name__ == "__main__":
    main()
