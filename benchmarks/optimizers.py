"""The optimizers beside each other: bytes of their states, time of a step, and what 8 bits cost in training.

    python benchmarks/optimizers.py            # --only memory, time or error; --rounds, --steps

The adapters have the shapes of LoRA on all linear layers of SmolLM2-135M; the model that learns is a small random Llama
that reads the bytes of this project's documentation. bitsandbytes takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import in_turns, machine, spread, table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from deltaw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from deltaw.optim import state_bytes

HIDDEN, INNER, KEYS, LAYERS = 576, 1536, 192, 30  # SmolLM2-135M
LINEARS = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN), *[(INNER, HIDDEN)] * 2, (HIDDEN, INNER)]
DOCS = Path(__file__).parent.parent

Make = Callable[..., torch.optim.Optimizer]


def bitsandbytes_8bit() -> Make | None:
    """bitsandbytes' own 8-bit AdamW, or None where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit
    except ImportError:
        return None


def adapters(r: int) -> list[nn.Parameter]:
    """A and B of every linear layer, with gradients."""
    torch.manual_seed(0)
    shapes = [shape for _ in range(LAYERS) for out, into in LINEARS for shape in ((r, into), (out, r))]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def memory(ranks: list[int]) -> str:
    """Bytes of the states after one step, measured."""
    kinds: dict[str, Make] = {
        "AdamW": lambda p: torch.optim.AdamW(p, fused=True),
        "8-bit AdamW": AdamW8bit,
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    }
    rows = []
    for r in ranks:
        params = adapters(r)
        row = [str(r), f"{sum(param.numel() for param in params) / 1e6:.1f} M"]
        for make in kinds.values():
            optimizer = make(params)
            optimizer.step()
            row.append(f"{state_bytes(optimizer).total / 2**20:.1f}")
            del optimizer
        rows.append(row)
    return table(["r", "parameters", *(f"{name}, MiB" for name in kinds)], rows)


def time(r: int, rounds: int) -> str:
    """A step over the adapters of rank ``r``."""
    kinds: dict[str, Make] = {
        "adamw_torch_fused": lambda p: torch.optim.AdamW(p, fused=True),
        "adamw_torch": torch.optim.AdamW,
        "adamw_8bit": AdamW8bit,
        "paged_adamw_32bit, all of it paged": lambda p: PagedAdamW32bit(p, paged_from=0),
        "paged_adamw_8bit, all of it paged": lambda p: PagedAdamW8bit(p, paged_from=0),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    }
    if theirs := bitsandbytes_8bit():
        kinds["bitsandbytes AdamW8bit"] = theirs
    made = {name: make(adapters(r)) for name, make in kinds.items()}
    seconds = in_turns({name: optimizer.step for name, optimizer in made.items()}, rounds)
    best = min(seconds["adamw_torch_fused"])
    rows = [
        [name, spread([1e3 * value for value in values], 1), f"{min(values) / best:.1f}"]
        for name, values in seconds.items()
    ]
    return table(["optim", "ms a step (min to max)", "best / fused's best"], rows)


def text() -> Tensor:
    """The bytes of README and docs."""
    files = [DOCS / "README.md", *sorted((DOCS / "docs").glob("*.md"))]
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def error(steps: int, seeds: int) -> str:
    """The loss that a model reaches with 8-bit states beside 32 bits, on rows that it was not trained on."""
    kinds: dict[str, Make] = {"AdamW, 32 bits": torch.optim.AdamW, "deltaw AdamW8bit": AdamW8bit}
    if theirs := bitsandbytes_8bit():
        kinds["bitsandbytes AdamW8bit"] = theirs
    data = text()
    data = data[: len(data) // 129 * 129].view(-1, 129)
    rows: list[list[str]] = []
    for seed in range(seeds):
        exact: Tensor | None = None
        for name, make in kinds.items():
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model: Any = LlamaForCausalLM(config)
            start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
            order = torch.randperm(len(data))
            held, seen = data[order[:64]], data[order[64:]]
            optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.0)
            for step in range(steps):
                batch = seen[torch.arange(step * 8, step * 8 + 8) % len(seen)]
                optimizer.zero_grad()
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
            with torch.no_grad():
                loss = model(input_ids=held, labels=held).loss.item()
            end = nn.utils.parameters_to_vector(model.parameters()).detach()
            exact = end if exact is None else exact
            apart = float((end - exact).norm() / (exact - start).norm())
            size = f"{state_bytes(optimizer).total / end.numel():.2f}"
            rows.append([str(seed), name, f"{loss:.4f}", f"{apart:.3f}", size])
    return table(["seed", f"{steps} steps", "loss on held-out text", "apart / way", "bytes an element"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["memory", "time", "error"], help="one of the three tables")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--rank", type=int, default=16, help="of the adapters whose step is timed")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(machine())
    if args.only in (None, "memory"):
        print(f"\nStates of LoRA on all linear layers of SmolLM2-135M\n\n{memory(args.ranks)}")
    if args.only in (None, "time"):
        print(f"\nOne step, {14 * LAYERS} tensors of rank {args.rank}\n\n{time(args.rank, args.rounds)}")
    if args.only in (None, "error"):
        print(f"\nA small Llama on text; the way is what 32 bits moved the weights\n\n{error(args.steps, args.seeds)}")


if __name__ == "__main__":
    main()
