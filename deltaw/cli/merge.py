"""``deltaw merge``: the adapter added into its base, saved as a plain model, with the drift measured."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaw.cli.common import AsJson, Dtype, Loaded, Model, emit, load_adapted, say, working
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


class Into(StrEnum):
    """What an adapter of a 4-bit run is merged into; each by its drift from the model that was trained."""

    #: the base in full precision
    full = "full"
    #: plain layers of the values that the 4-bit base is read as
    dequantized = "dequantized"
    #: the 4-bit base, rounded to 4 bits again
    quantized = "4bit"


def merge(
    adapter: Annotated[str, typer.Option("--adapter", "-a", help="Folder of the adapter.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged model goes; new or empty.")],
    model: Model = None,
    dtype: Dtype = "auto",
    into: Annotated[
        Into | None,
        typer.Option(
            "--into",
            help="Of a 4-bit run: plain layers of its 4-bit values (default), its base in full precision, or 4 bits.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write base and adapter as one model that needs no adapter code, and say how far its logits moved."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not empty: nothing was written; name a new folder")
    with working():
        loaded = load_adapted(model, adapter, dtype)
        result: dict[str, Any] = {"model": loaded.name, "adapter": adapter, "output": str(output)}
        if _is_quantized(loaded.model):
            found = _of_4_bits(loaded, into, lambda: load_adapted(model, adapter, dtype, load_in_4bit=False))
        elif into not in (None, Into.full):
            raise ConfigError(f"--into {into}: the base of this run is not in 4 bits; leave --into out")
        else:
            before = _probe(loaded.model, loaded.tokenizer)
            merged = loaded.model.merge_and_unload(progressbar=False, safe_merge=True)
            found = _Merged(merged, _drift(before, _probe(merged, loaded.tokenizer)))
        _save_whole(found.model, loaded.tokenizer, output)
    result["drift"] = dataclasses.asdict(found.drift)
    if found.into is not None:
        result["into"] = str(found.into)
        result["drifts"] = {str(way): dataclasses.asdict(drift) for way, drift in found.drifts.items()}
        result["better"] = str(found.better)
        result["rounding"] = None if found.rounding is None else dataclasses.asdict(found.rounding)
    emit(result, as_json, lambda console: _show(console, output, found))
    if found.drift.same_argmax < _SAME_ENOUGH:
        best = found.into is None or found.into == found.better  # of the ways that there are
        better = "--dtype float32" if best else f"--into {found.better}"
        say().print(
            f"warning: {1 - found.drift.same_argmax:.0%} of the likeliest tokens differ: merge with {better}, "
            "or keep the adapter apart",
            style="yellow",
            soft_wrap=True,
        )


@dataclasses.dataclass
class _Merged:
    """A merged model and how far it is from the adapter beside its base; of a 4-bit run also what else there was."""

    model: Any
    drift: Any
    into: Into | None = None
    drifts: dict[Into, Any] = dataclasses.field(default_factory=dict)
    rounding: Any = None

    @property
    def better(self) -> Into:
        return min(self.drifts, key=lambda way: self.drifts[way].kl)


def _is_quantized(model: Any) -> bool:
    from deltaw.adapters import host_layers

    return any(host.store.quantized for _, host in host_layers(model))


def _of_4_bits(loaded: Loaded, into: Into | None, in_full: Callable[[], Loaded]) -> _Merged:
    """Merges every way that there is, one model in memory beside the 4-bit one at a time, and keeps the one asked for.

    Raises:
        ConfigError: the base in full precision is asked for, and its files hold 4 bits.
    """
    from deltaw.adapters import host_layers
    from deltaw.merge import Requantization, make_hosts_dense, merge_adapters, unmerge_adapters

    into = into or Into.dequantized
    full = in_full().model if into == Into.full else None
    if full is not None and _is_quantized(full):
        raise ConfigError("--into full: the base's files hold 4-bit weights; give the one in full precision, --model")
    base, before = loaded.model.get_base_model(), _probe(loaded.model, loaded.tokenizer)

    def drift_of_merging() -> Any:
        merge_adapters(base, loaded.model.active_adapters, measuring=True)
        return _drift(before, _probe(loaded.model, loaded.tokenizer))

    drifts = {Into.quantized: drift_of_merging()}
    rounding = Requantization.of(host_layers(base))
    unmerge_adapters(loaded.model)
    packed = make_hosts_dense(loaded.model)
    drifts[Into.dequantized] = drift_of_merging()
    unmerge_adapters(loaded.model)
    for host, layer in packed:
        host.base_layer = layer
    if full is None:
        merged = loaded.model.merge_and_unload(dequantize=into == Into.dequantized)
        return _Merged(merged, drifts[into], into, drifts, rounding)
    merged = full.merge_and_unload()
    drifts[Into.full] = _drift(before, _probe(merged, loaded.tokenizer))
    return _Merged(merged, drifts[into], into, drifts, rounding)


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


def _show(console: Console, output: Path, found: _Merged) -> None:
    console.print(f"[bold green]merged[/] into {output}", soft_wrap=True)
    if found.into is None:
        console.print(f"  {found.drift}", markup=False, soft_wrap=True)
        return
    for way, drift in found.drifts.items():
        mark = "written" if way == found.into else "not written"
        console.print(f"  {way} ({mark}): {drift}", markup=False, soft_wrap=True)
    console.print(f"  {found.rounding}", markup=False, soft_wrap=True)
    console.print(f"  better: {found.better}", markup=False, soft_wrap=True)
