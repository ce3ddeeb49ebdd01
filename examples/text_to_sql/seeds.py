"""The demo's recipe over several seeds and the full test sets: mean and spread, beside the baseline.

    cd examples && python -m text_to_sql.seeds [--seeds 0 1 2] [--splits wording both] [--out FILE]

A seed draws the training rows, their order and the adapter; the test sets stay the same. Each finished seed is
written to ``--out`` at once and is not run again, so the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaw.atomic import write_text

from .baseline import Baseline
from .build import TEST_SPLITS, build
from .demo import ALL_QUESTIONS, RECIPE, Settings
from .demo_steps import load_base, measure, tally
from .demo_training import train
from .score import score

__all__ = ["main"]


def one_seed(seed: int, splits: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Trains and asks every question: ``{"train_seconds", "loss", split: {"deltaw", "baseline"}, ...}``."""
    rows = build(seed, settings.train_rows, ALL_QUESTIONS)
    base, tokenizer = load_base(settings.model)
    with tempfile.TemporaryDirectory() as folder:
        learned = train(
            base,
            tokenizer,
            rows["train"],
            RECIPE,
            base=settings.model,
            seed=seed,
            seconds=settings.train_seconds,
            output=Path(folder),
            stream=sys.stderr,
            quiet=False,
        )
    model = learned.model.eval()
    scores = tally(measure(model, tokenizer, {split: rows[split] for split in splits}))
    baseline = Baseline(rows["train"])
    found: dict[str, Any] = {
        "seed": seed,
        "train_seconds": learned.seconds,
        "steps": learned.stopped or RECIPE["max_steps"],
        "loss": statistics.fmean(entry["loss"] for entry in learned.log[-10:]),
    }
    for split in splits:
        guessed = score([baseline.answer(row) for row in rows[split]], rows[split])
        found[split] = {"deltaw": scores[split].value, "baseline": guessed.accuracy}
    return found


def show(found: list[dict[str, Any]], splits: Sequence[str]) -> str:
    """A Markdown table: mean (lowest to highest) of the seeds."""
    lines = ["| split | deltaw | without training |", "| --- | ---: | ---: |"]
    for split in splits:
        cells = []
        for who in ("deltaw", "baseline"):
            shares = [100 * one[split][who] for one in found if split in one]
            cells.append(f"{statistics.fmean(shares):.1f}% ({min(shares):.1f} to {max(shares):.1f})")
        lines.append(f"| `{split}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m text_to_sql.seeds", description="The demo over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--splits", nargs="+", choices=TEST_SPLITS, default=list(TEST_SPLITS))
    parser.add_argument("--out", type=Path, default=Path("runs/seeds.json"), help="finished seeds (%(default)s)")
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    for seed in options.seeds:
        if any(one["seed"] == seed for one in found):
            continue
        found.append(one_seed(seed, options.splits, Settings()))
        write_text(options.out, json.dumps(found, indent=2) + "\n")
        print(json.dumps(found[-1]), flush=True)
    print(show(found, options.splits))


if __name__ == "__main__":
    main()
