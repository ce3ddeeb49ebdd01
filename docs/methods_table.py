"""Writes docs/methods.md: the methods, and what each can do on every kind of layer.

    python docs/methods_table.py            # writes the file; tests/test_methods_table.py checks that it is up to date

Nothing in the table is declared: each cell is found by trying, on the layers and settings of the matrix test.
"""

from __future__ import annotations

import functools
import sys
import zlib
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import yaml
from matrix import CASES, LAYERS, ROWS, adapted
from torch import Tensor
from torch._dynamo.exc import Unsupported

from deltaw.adapterfields import AdapterFields, methods_of
from deltaw.errors import DeltawError
from deltaw.methods import INITIALISERS, METHODS

__all__ = ["FILE", "page", "table", "tried"]

FILE = Path(__file__).with_name("methods.md")
ACTS = ("mixed batch", "merge", "compile")
HEADS = {
    "Linear": "`nn.Linear`",
    "Conv1D": "`Conv1D` of transformers",
    "Embedding": "`nn.Embedding`",
    "Conv1d": "`nn.Conv1d`",
    "Conv2d": "`nn.Conv2d`",
    "Conv3d": "`nn.Conv3d`",
    "grouped": "`nn.Conv2d`, grouped",
}
NEAR = 1e-5  # of the largest output, in float32


@torch.no_grad()
def stir(model: Any) -> Any:
    """Noise on what the adapters hold, so that they do something."""
    for name, parameter in model.named_parameters():
        if ".base_layer." not in name and "ranknum" not in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= NEAR * b.abs().max())


@functools.cache
def tried(method: str, layer: str) -> dict[str, bool] | None:
    """Act -> whether the method can do it on the layer; None where it cannot be put there at all."""
    x = LAYERS[layer].inputs()
    try:
        model = stir(adapted(CASES[method], layer, names=("a", "b")))
        model.set_adapter("a")
        with torch.no_grad():
            alone = model(x)
    except DeltawError:
        return None
    return {act: attempt(model, x, alone) for act, attempt in zip(ACTS, (_mixes, _merges, _compiles), strict=True)}


def _mixes(model: Any, x: Tensor, alone: Tensor) -> bool:
    """Rows of one batch through one adapter, another, and none."""
    assert ROWS == 3
    try:
        with torch.no_grad():
            mixed = model(x, adapter_names=["a", "b", "__base__"])
            model.set_adapter("b")
            other = model(x)
            with model.disable_adapter():
                bare = model(x)
    except DeltawError:
        return False
    finally:
        model.set_adapter("a")
    return near(mixed, torch.stack([alone[0], other[1], bare[2]]))


def _merges(model: Any, x: Tensor, alone: Tensor) -> bool:
    try:
        model.merge_adapter(["a"])
    except DeltawError:
        return False
    with torch.no_grad():
        merged = model(x)
    model.unmerge_adapter()
    return near(merged, alone)


def _compiles(model: Any, x: Tensor, alone: Tensor) -> bool:
    """As one graph, without a break; what is generated from it is torch's business."""
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    try:
        with torch.no_grad():
            return near(compiled(x), alone)
    except Unsupported:
        return False


def table() -> str:
    """Methods by layers, in Markdown."""
    lines = ["| method | " + " | ".join(HEADS[layer] for layer in LAYERS) + " |", "| --- |" + " --- |" * len(LAYERS)]
    for method in METHODS:
        cells = []
        for layer in LAYERS:
            found = tried(method, layer)
            missing = [f"no {act}" for act in ACTS if found is not None and not found[act]]
            cells.append("-" if found is None else ", ".join(["yes", *missing]))
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def settings() -> str:
    """The keys of a run that describe its adapter, in Markdown."""
    lines = ["| key | of | default | what it is |", "| --- | --- | --- | --- |"]
    for key, field in AdapterFields.model_fields.items():
        default = "-" if field.default is None else f"`{yaml.safe_dump(field.default).splitlines()[0]}`"
        lines.append(f"| `{key}` | {', '.join(methods_of(key)) or 'all'} | {default} | {field.description} |")
    return "\n".join(lines)


def page() -> str:
    """The whole file."""
    said = [
        f"| `{name}` | {method.what} | {method.when} | {method.paper}, [arXiv {method.arxiv}]"
        f"(https://arxiv.org/abs/{method.arxiv}) | `{_call(name)}` |"
        for name, method in METHODS.items()
    ]
    starts = "\n".join(f"- `init_lora_weights={name!r}`: {what}." for name, what in INITIALISERS.items())
    return f"""# Methods

Written by `python docs/methods_table.py`; do not edit. `deltaw methods` prints the first table with the number of
parameters that each method trains on a given model; `deltaw train --method NAME` trains one.

| method | what it is | when to use it | paper | in code |
| --- | --- | --- | --- | --- |
{chr(10).join(said)}

Other starts of LoRA's A and B:

{starts}

## On which layer

`yes`: it trains there, rows of one batch can go through several adapters (`adapter_names=[...]`), it merges into the
base and comes out of it bitwise, and forward compiles as one graph. What it cannot do is named; `-`: the method refuses
the layer, by name, when it is injected. Every cell was found by trying.

{table()}

With groups, LoRA's A spans all input channels, as in PEFT's files, so its update has no place in the base's weight.
PiSSA and OLoRA decompose matrices; on an embedding they begin as LoRA does.

## In a run

The keys of a `run.yaml` for `deltaw train`, each a flag too. The defaults of rank, alpha, dropout and layers are those
of `preset: standard`. A key of another method is an error that says whose it is.

{settings()}
"""


def _call(name: str) -> str:
    method = METHODS[name]
    return f"{method.config}({', '.join(f'{key}={value!r}' for key, value in method.fixes.items())})"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
