"""``make demo``: a small language model learns to answer questions in SQL, in minutes, on a CPU.

    python examples/text_to_sql/demo.py [--full] [--steps N] [--questions N] [--seed S] [--output FOLDER] [--quiet]

This file holds the settings and the command line, and shows the task. Then ``demo_story`` tells the story from
the first answer to the merged model, in the steps of ``demo_steps``; ``demo_show`` prints it and ``demo_page``
writes the report.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the folder above holds the package; this one must not, it has a score.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deltaw.errors import ConfigError, DeltawError, MissingExtra
from text_to_sql.build import TEST_SPLITS, build
from text_to_sql.demo_show import Show
from text_to_sql.score import execute

__all__ = ["RECIPE", "Settings", "main", "run"]

# Fields of LoraConfig and of SFTConfig.
RECIPE: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "max_steps": 132,
    "warmup_steps": 6,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "group_by_length",
}
ALL_QUESTIONS = 300


@dataclass(frozen=True)
class Settings:
    """One run of the demo.

    Attributes:
        model: built-in name or folder of the base.
        recipe: see ``RECIPE``.
        seed: of the training rows, their order and the adapter.
        questions: asked in each split after training.
        before: asked in each split before it; an untrained model rambles, so each answer takes its whole limit.
        train_rows: that the recipe's steps draw from.
        train_seconds: training ends there, on however slow a machine.
        output: folder for adapter, report and numbers.
    """

    model: str = "smollm2-135m"
    recipe: dict[str, Any] = field(default_factory=lambda: dict(RECIPE))
    seed: int = 0
    questions: int = 100
    before: int = 25
    train_rows: int = 2000
    train_seconds: float = 176.0
    output: Path = Path("runs/demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    settings, quiet = parse(arguments)
    try:
        run(settings, Show(quiet=quiet))
    except DeltawError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, bool]:
    """The command line: the settings, and whether to be quiet."""
    usual = Settings()
    parser = argparse.ArgumentParser(
        prog="demo.py", description="A small language model learns to answer questions in SQL."
    )
    add = parser.add_argument
    add("--full", action="store_true", help=f"ask all {ALL_QUESTIONS} questions of each split")
    add("--steps", type=int, default=RECIPE["max_steps"], help="training steps (%(default)s)")
    add("--questions", type=int, help=f"questions a split ({usual.questions})")
    add("--seed", type=int, default=usual.seed, help="of the training rows and the adapter (%(default)s)")
    add("--output", type=Path, default=usual.output, help="where it is saved (%(default)s)")
    add("--model", default=usual.model, help="built-in name or folder of the base (%(default)s)")
    add("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_args(arguments)
    questions = options.questions
    if questions is None:
        questions = ALL_QUESTIONS if options.full else usual.questions
    if options.steps < 1 or not 1 <= questions <= ALL_QUESTIONS:
        parser.error(f"--steps is at least 1 and --questions from 1 to {ALL_QUESTIONS}")
    settings = Settings(
        model=options.model,
        recipe={**RECIPE, "max_steps": options.steps},
        seed=options.seed,
        questions=questions,
        output=options.output,
    )
    return settings, options.quiet


def run(settings: Settings, show: Show) -> dict[str, Any]:
    """The whole demo; returns what ``results.json`` holds.

    Raises:
        DeltawError: whatever goes wrong on the way.
    """
    _prepare(settings.output)
    rows = build(settings.seed, settings.train_rows, settings.questions)
    asked = rows["both"][0]
    schema = asked["prompt"][0]["content"].partition("(")[2].rstrip(")")
    columns = [column.split()[0] for column in schema.split(", ")]
    show.task(asked, execute(f"select * from {asked['table']} limit 3"), columns)
    from text_to_sql.demo_story import (
        Story,
    )  # loads torch, which takes seconds: the task is on the screen first

    story = Story(settings, show, rows["train"], {split: rows[split] for split in TEST_SPLITS})
    story.load()
    story.ask_before()
    story.learn()
    story.read_back()
    story.ask_after()
    story.merge()
    return story.save()


def _prepare(folder: Path) -> None:
    """Tries now what would otherwise fail after minutes."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file: name a folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "examples", "drawing the demo's report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be made: {error.strerror}; name another folder") from error


if __name__ == "__main__":
    sys.exit(main())
