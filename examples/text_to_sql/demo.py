"""``make demo``: a small language model learns to answer questions in SQL, in minutes, on a CPU.

    python examples/text_to_sql/demo.py [--full] [--steps N] [--questions N] [--seed S] [--output FOLDER] [--quiet]
    python examples/text_to_sql/demo.py --load-in-4bit      # QLoRA: the base in 4 bits, beside an earlier 16-bit run

This file holds the settings and the command line, and shows the task. Then ``demo_story`` tells the story from
the first answer to the merged model, in the steps of ``demo_steps`` and ``demo_training``; ``demo_show`` prints it
and ``demo_page`` writes the report.
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
    "use_rslora": True,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "max_steps": 132,
    "warmup_steps": 6,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "group_by_length",
}
QLORA_RECIPE = {**RECIPE, "optim": "paged_adamw_8bit"}
ALL_QUESTIONS = 300
QLORA_OUTPUT = Path("runs/demo-qlora")


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
        load_in_4bit: keep the base in 4 bits (NF4, double quantized), and show the run beside ``beside``.
        beside: ``results.json`` of the same run in 16 bits.
    """

    model: str = "smollm2-135m"
    recipe: dict[str, Any] = field(default_factory=lambda: dict(RECIPE))
    seed: int = 0
    questions: int = 100
    before: int = 25
    train_rows: int = 2000
    train_seconds: float = 176.0
    output: Path = Path("runs/demo")
    load_in_4bit: bool = False
    beside: Path = Path("runs/demo/results.json")


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
    add("--output", type=Path, help=f"where it is saved ({usual.output}, or {QLORA_OUTPUT} in 4 bits)")
    add("--load-in-4bit", action="store_true", help="keep the base's weights in 4 bits (QLoRA)")
    add("--beside", type=Path, default=usual.beside, help="results of the 16-bit run to compare with (%(default)s)")
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
        recipe={**(QLORA_RECIPE if options.load_in_4bit else RECIPE), "max_steps": options.steps},
        seed=options.seed,
        questions=questions,
        output=options.output or (QLORA_OUTPUT if options.load_in_4bit else usual.output),
        load_in_4bit=options.load_in_4bit,
        beside=options.beside,
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
    story.compare()
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
