"""``deltaw merge``: the adapter added into its base, saved as a plain model, with the drift measured."""

from __future__ import annotations

import dataclasses
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

_SAME_ENOUGH = 0.95  # share of positions with the same likeliest token; below it the person is warned
# Any text will do to compare two models; several kinds, so that the drift of one kind is not taken for all.
_PROBES = (
    "The capital of France is Paris, and the capital of Italy is",
    "SELECT name, COUNT(*) FROM visits WHERE year > 2019 GROUP BY",
    "def mean(values):\n    return sum(values) /",
    "Question: how many minutes are there in three hours?\nAnswer:",
)


def merge(
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Folder of the adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged model goes; new or empty.")],
    model: Model = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Write base and adapter as one model that needs no adapter code, and say how far its logits moved."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not empty: nothing was written; name a new folder")
    with working():
        loaded = load_adapted(model, adapter, dtype)
        before = _probe(loaded.model, loaded.tokenizer)
        merged = loaded.model.merge_and_unload(progressbar=False, safe_merge=True)
        drift = _drift(before, _probe(merged, loaded.tokenizer))
        _save_whole(merged, loaded.tokenizer, output)
    result = {
        "model": loaded.name,
        "adapter": adapter,
        "output": str(output),
        "drift": dataclasses.asdict(drift),
    }
    emit(result, as_json, lambda console: _show(console, output, drift))
    if drift.same_argmax < _SAME_ENOUGH:
        say().print(
            f"warning: {1 - drift.same_argmax:.0%} of the likeliest tokens differ: merge with --dtype "
            "float32, or keep the adapter apart",
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


def _drift(before: list[Any], after: list[Any]) -> Any:
    """The two compared, as ``deltaw.merge_report`` does it, without holding two copies of the weights."""
    import torch

    from deltaw.merge import MergeReport

    return MergeReport.between(torch.cat(before), torch.cat(after))


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


def _show(console: Console, output: Path, drift: Any) -> None:
    console.print(f"[bold green]merged[/] into {output}", soft_wrap=True)
    console.print(f"  {drift}", markup=False, soft_wrap=True)
