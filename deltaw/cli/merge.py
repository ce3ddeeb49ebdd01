"""``deltaw merge``: the adapter added into its base, saved as a plain model, with the drift measured."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaw.cli.common import AsJson, Dtype, Model, emit, load_adapted, say, working
from deltaw.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["merge"]

# Any text will do to compare two models; several kinds, so that the drift of one kind is not taken for all.
_PROBES = (
    "The capital of France is Paris, and the capital of Italy is",
    "SELECT name, COUNT(*) FROM visits WHERE year > 2019 GROUP BY",
    "def mean(values):\n    return sum(values) /",
    "Question: how many minutes are there in three hours?\nAnswer:",
)


def merge(
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Folder of the adapter.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the merged model goes; new or empty.")
    ],
    model: Model = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write base and adapter as one model that needs no adapter code, and say how far its logits moved."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"--output {output} exists and is not empty: nothing was written; name a new folder"
        )
    with working():
        loaded = load_adapted(model, adapter, dtype)
        before = _probe(loaded.model, loaded.tokenizer)
        merged = loaded.model.merge_and_unload(progressbar=False, safe_merge=True)
        drift = _drift(before, _probe(merged, loaded.tokenizer))
        _save_whole(merged, loaded.tokenizer, output)
    result = {"model": loaded.name, "adapter": adapter, "output": str(output), "drift": drift}
    emit(result, as_json, lambda console: _show(console, result))
    if drift["argmax_differs"] > 0.05:
        say().print(
            "warning: more than 5% of the likeliest tokens differ: merge with --dtype float32, "
            "or keep the adapter apart",
            style="yellow",
        )


def _probe(model: Any, tokenizer: Any) -> list[Any]:
    """The logits after every token of every probe, (tokens, vocabulary) float32 each."""
    import torch

    from deltaw.evaluate.generate import as_prompt_ids, inference

    logits = []
    device = next(model.parameters()).device
    with inference(model):
        for text in _PROBES:
            ids = torch.tensor([as_prompt_ids(text, tokenizer)], device=device)
            logits.append(model(input_ids=ids).logits[0].float().cpu())
    return logits


def _drift(before: list[Any], after: list[Any]) -> dict[str, float | int]:
    import torch

    a, b = torch.cat(before), torch.cat(after)  # (all tokens, vocabulary)
    gap = (a - b).abs()
    return {
        "max": float(gap.max()),
        "mean": float(gap.mean()),
        "logit_scale": float(a.abs().mean()),
        "argmax_differs": float((a.argmax(-1) != b.argmax(-1)).float().mean()),
        "tokens": len(a),
    }


def _save_whole(model: Any, tokenizer: Any, output: Path) -> None:
    """All or nothing: written beside ``output``, then renamed to it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.chmod(0o755)  # a temporary folder is its owner's alone
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _show(console: Console, result: dict[str, Any]) -> None:
    drift = result["drift"]
    console.print(f"[bold green]merged[/] into {result['output']}")
    console.print(
        f"  drift over {drift['tokens']} tokens: logits differ by {drift['mean']:.2g} on average and "
        f"{drift['max']:.2g} at most (their size is {drift['logit_scale']:.2g}); "
        f"{100 * drift['argmax_differs']:.1f}% of the likeliest tokens differ"
    )
