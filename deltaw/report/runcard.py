"""The model card of a run: its figures, what it was made of, its proof, and the picture of its loss.

Given the numbers of ``all_results.json`` and the log, writes two files. Knows nothing of how a run is done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.adapters import PeftConfig
from deltaw.atomic import aside
from deltaw.card import RunFacts, write_card
from deltaw.errors import MissingExtra
from deltaw.report.charts import loss_picture

__all__ = ["PICTURE", "write_run_card"]

PICTURE = "training_loss.png"

#: key of the results -> what the card calls it, and how the number is written
_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "train_loss": ("training loss, mean over the run", "{:.4f}".format),
    "eval_loss": ("evaluation loss", "{:.4f}".format),
    "eval_perplexity": ("evaluation perplexity", "{:.4g}".format),
    "eval_mean_token_accuracy": ("evaluation tokens right", "{:.2%}".format),
    "eval_exact_match": ("evaluation answers right", "{:.1%}".format),
    "epoch": ("epochs", "{:.2f}".format),
    "train_tokens": ("tokens", "{:,.0f}".format),
    "train_tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "train_runtime": ("seconds", "{:,.0f}".format),
    "trainable_params": ("trained parameters", "{:,.0f}".format),
    "all_params": ("all parameters", "{:,.0f}".format),
    "nonfinite_steps": ("steps skipped, not finite", "{:.0f}".format),
}
_ORIGIN = {
    "base_model": "base model",
    "base_revision": "base revision",
    "base_fingerprint": "base hash",
    "dataset_fingerprint": "data fingerprint",
    "template_fingerprint": "chat template hash",
}

log = logging.getLogger("deltaw")


def write_run_card(
    folder: str | Path,
    config: PeftConfig,
    results: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    *,
    proof: Sequence[str] = (),
    command: str = "",
) -> bool:
    """Writes ``README.md`` into an adapter's folder, and the picture of its loss beside it, if matplotlib is there.

    Args:
        folder: of the adapter.
        config: of the adapter.
        results: as in ``all_results.json``; keys that are missing or None are left out.
        history: the logs of the run, each with its ``step``.
        proof: sentences on the adapter read back from disk.
        command: how the run was started.

    Returns:
        Whether a card was written: one that a user wrote is left alone.
    """
    folder = Path(folder)
    figures = {
        name: form(float(results[key])) for key, (name, form) in _FIGURES.items() if results.get(key) is not None
    }
    origin = {name: f"`{results[key]}`" for key, name in _ORIGIN.items() if results.get(key)}
    if versions := results.get("versions"):
        origin["versions"] = ", ".join(f"{name} {value}" for name, value in versions.items())
    picture = _draw(folder / PICTURE, history)
    return write_card(folder, config, RunFacts(figures, origin, proof, command, picture))


def _draw(path: Path, history: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the picture, or None where there is nothing to draw, or nothing to draw with."""
    trained = [entry for entry in history if "loss" in entry]
    if not any(math.isfinite(float(entry["loss"])) for entry in trained):
        return None
    rates = [float(entry.get("learning_rate", math.nan)) for entry in trained]
    try:
        drawn = loss_picture(
            [entry["step"] for entry in trained],
            [float(entry["loss"]) for entry in trained],
            learning_rate=rates if all(map(math.isfinite, rates)) else None,
            evaluations=[(entry["step"], float(entry["eval_loss"])) for entry in history if "eval_loss" in entry],
        )
    except MissingExtra as error:
        log.info("the model card has no picture: %s", error)
        return None
    with aside(path) as part:
        part.write_bytes(drawn)
    return path.name
