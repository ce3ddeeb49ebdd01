"""``deltaw methods``: what there is to choose from, and how many parameters each method trains on a given model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaw.cli.common import AsJson, emit, working
from deltaw.methods import INITIALISERS, METHODS

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["count", "methods"]


def methods(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Count for this model: a folder, a built-in name or a hub id.")
    ] = "smollm2-135m",
    r: Annotated[int, typer.Option("--r", help="Rank to count at, on all linear layers.", min=1)] = 16,
    as_json: AsJson = False,
) -> None:
    """List the methods: what each is, its paper, the parameters it trains, and when to use it."""
    with working():
        counts, everything = count(model, r)
    rows = [
        {
            "name": name,
            "title": method.title,
            "what": method.what,
            "paper": f"{method.paper}, arXiv {method.arxiv}",
            "when": method.when,
            "config": method.config,
            "fixes": dict(method.fixes),
            "trainable_params": counts[name],
        }
        for name, method in METHODS.items()
    ]
    result = {"model": model, "r": r, "base_params": everything, "methods": rows, "init_lora_weights": INITIALISERS}
    emit(result, as_json, lambda console: _show(console, result))


def count(model: str, r: int) -> tuple[dict[str, int], int]:
    """(method -> parameters it trains as ``deltaw train`` would set it up, parameters of the base).

    The layers are the model's own and the adapters are injected as for a run, all without memory.

    Raises:
        ModelError: there is no such model.
        TargetError: it has no linear layers.
    """
    from deltaw.adapterfields import ranks
    from deltaw.config import RunConfig
    from deltaw.pipeline import adapter_config
    from deltaw.skeleton import count_trainable, skeleton

    base = skeleton(model)
    counts = {}
    for name in METHODS:
        run = RunConfig.model_validate(
            {"model_name_or_path": model, "dataset_name": "rows", "method": name, **ranks(name, r)}
        )
        counts[name] = count_trainable(base, adapter_config(run, steps=1000))
    return counts, sum(parameter.numel() for parameter in base.parameters())


def _show(console: Console, result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("method", style="bold cyan", no_wrap=True)
    table.add_column("what it is", ratio=5)
    table.add_column("trains", justify="right", no_wrap=True)
    table.add_column("when to use it", ratio=5)
    table.add_column("paper", style="dim", ratio=3)
    for row in result["methods"]:
        table.add_row(row["name"], row["what"], f"{row['trainable_params']:,}", row["when"], row["paper"])
    console.print(table)
    inits = "; ".join(f"{name}: {what}" for name, what in result["init_lora_weights"].items())
    console.print(
        f"\nParameters at r = {result['r']} on all linear layers of {result['model']} "
        f"({result['base_params']:,}); adalora counts its first, larger rank.\n"
        f"To choose one: deltaw train --method NAME. Other starts of A and B, by init_lora_weights: {inits}.",
        style="dim",
        markup=False,
        soft_wrap=True,
    )
