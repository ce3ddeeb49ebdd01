"""The hard set, asked of three models: the base, the base trained on the easy set, and trained on the hard one.

    cd examples && python -m text_to_sql.hard [--steps 132] [--questions 300] [--seeds 0] [--out FILE]

The recipe is the demo's, with no clock. Beside them stands what is reached without training: the nearest training
question with the names swapped in. Each finished model is written to ``--out`` at once and is not trained again: the
script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from deltaw.atomic import write_text
from deltaw.errors import DeltawError

from .build import TEST_SPLITS, build
from .demo import RECIPE, Settings
from .demo_steps import load_base, measure
from .demo_training import train
from .hard_baseline import HardBaseline
from .hard_build import GOLD, build_hard, hard_database
from .hard_questions import HARD_KINDS
from .score import Outcome, score

__all__ = ["ARMS", "main", "one_arm", "show"]

MAX_NEW_TOKENS = 64  # the longest gold query of a test split has 43 tokens of SmolLM2
#: the models, and what each is called
ARMS = {
    "nearest": "nearest question, no training",
    "base": "base model, no training",
    "easy": "trained on the easy set",
    "hard": "trained on the hard set",
}
SEEDLESS = ("base",)


def one_arm(arm: str, seed: int, steps: int, settings: Settings) -> dict[str, Any]:
    """Trains where there is something to train, and asks every question: ``{"right": {split: {kind: [...]}}, ...}``."""
    rows = build_hard(seed, settings.train_rows if arm in ("nearest", "hard") else 0, settings.questions)
    splits = {split: rows[split] for split in TEST_SPLITS}
    run = hard_database().run
    if arm == "nearest":
        baseline = HardBaseline(rows["train"])
        found = {s: score([baseline.answer(row) for row in each], each, run).outcomes for s, each in splits.items()}
        return {"right": _by_kind(found)}
    model, tokenizer = load_base(settings.model)
    facts: dict[str, Any] = {}
    if arm != "base":
        train_rows = rows["train"] if arm == "hard" else build(seed, settings.train_rows, 0)["train"]
        with tempfile.TemporaryDirectory() as folder:
            learned = train(
                model,
                tokenizer,
                train_rows,
                {**settings.recipe, "max_steps": steps},
                base=settings.model,
                seed=seed,
                seconds=None,
                output=Path(folder),
                stream=sys.stderr,
                quiet=False,
            )
        model = learned.model.eval()
        loss = statistics.fmean(entry["loss"] for entry in learned.log[-10:])
        facts = {"train_seconds": learned.seconds, "train_tokens": learned.tokens, "loss": loss}
    outcomes = measure(model, tokenizer, splits, max_new_tokens=MAX_NEW_TOKENS, run=run)
    return {"right": _by_kind(outcomes), **facts}


def _by_kind(outcomes: dict[str, tuple[Outcome, ...]]) -> dict[str, dict[str, list[bool]]]:
    return {
        split: {kind: [one.status == "correct" for one in each if one.kind == kind] for kind in HARD_KINDS}
        for split, each in outcomes.items()
    }


def show(found: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables, by split and by kind of question: mean of the seeds (lowest to highest)."""

    def table(title: str, columns: Iterable[str], cell: Callable[[dict[str, Any], str], list[bool]]) -> list[str]:
        names = list(columns)
        lines = [
            f"| {title} | seeds | " + " | ".join(f"`{name}`" for name in names) + " |",
            "| --- | ---: |" + " ---: |" * len(names),
        ]
        for arm, said in ARMS.items():
            runs = [run for run in found if run["arm"] == arm]
            if runs:
                cells = [_share([cell(run, name) for run in runs]) for name in names]
                lines.append(f"| {said} | {len(runs)} | " + " | ".join(cells) + " |")
        return lines

    def all_kinds(run: dict[str, Any], split: str) -> list[bool]:
        return [right for kind in run["right"][split].values() for right in kind]

    def all_splits(run: dict[str, Any], kind: str) -> list[bool]:
        return [right for split in run["right"].values() for right in split[kind]]

    return "\n".join([*table("by split", TEST_SPLITS, all_kinds), "", *table("by kind", HARD_KINDS, all_splits)])


def _share(runs: Sequence[Sequence[bool]]) -> str:
    shares = [100 * sum(each) / len(each) for each in runs if each]
    if not shares:
        return "-"
    spread = f" ({min(shares):.1f} to {max(shares):.1f})" if len(shares) > 1 else ""
    return f"{statistics.fmean(shares):.1f}%{spread}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m text_to_sql.hard", description="The hard set, before and after.")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=RECIPE["max_steps"], help="of every training (%(default)s)")
    parser.add_argument("--questions", type=int, default=GOLD, help="of each split (%(default)s)")
    parser.add_argument("--train-rows", type=int, default=Settings.train_rows, help="to draw from (%(default)s)")
    parser.add_argument("--model", default=Settings.model, help="built-in name or folder (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/hard.json"), help="finished models (%(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.train_rows < 1 or not 1 <= options.questions <= GOLD:
        parser.error(f"--steps and --train-rows are at least 1 and --questions from 1 to {GOLD}")
    settings = Settings(model=options.model, questions=options.questions, train_rows=options.train_rows)
    setting = {key: getattr(options, key) for key in ("model", "steps", "questions", "train_rows")}
    found: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    try:
        for seed in options.seeds:
            for arm in options.arms:
                key = {**setting, "arm": arm, "seed": 0 if arm in SEEDLESS else seed}
                if any(key.items() <= run.items() for run in found):
                    continue
                found.append(key | one_arm(arm, key["seed"], options.steps, settings))
                write_text(options.out, json.dumps(found, indent=1) + "\n")  # at once: a training takes minutes
    except DeltawError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(show([run for run in found if setting.items() <= run.items() and run["arm"] in options.arms]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
