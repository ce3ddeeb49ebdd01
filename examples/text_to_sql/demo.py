"""``make demo``: a small language model learns to answer questions in SQL, in minutes, on a CPU.

    python examples/text_to_sql/demo.py [--full] [--steps N] [--questions N] [--seed S] [--output FOLDER] [--quiet]

Asks the model before training, trains a LoRA adapter, reads it back from disk, asks again, merges it, and
writes a report. This file is the story and its settings; the steps are in ``demo_steps``, what is printed in
``demo_show``, the report in ``demo_page``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: the folder above holds the package; this one must not, it has a score.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from deltaw.errors import ConfigError, DeltawError, MissingExtra
from text_to_sql.baseline import Baseline
from text_to_sql.build import TEST_SPLITS, build
from text_to_sql.demo_show import SPLIT_NAMES, Example, Show, clock, megabytes, rows_text
from text_to_sql.score import Outcome, execute, score

if TYPE_CHECKING:
    from deltaw.evaluate import Score

# Fields of LoraConfig and of SFTConfig.
RECIPE: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "max_steps": 70,
    "warmup_steps": 3,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "group_by_length",
}
MODEL = "smollm2-135m"
TRAIN_ROWS = 2000
TRAIN_SECONDS = 170.0  # training ends there, on however slow a machine
QUESTIONS = 100  # a split
ALL_QUESTIONS = 300
BEFORE_QUESTIONS = 25  # a split; an untrained model rambles, so that each answer takes its whole limit
MERGED_SPLIT = "wording"

Splits = Mapping[str, Sequence[Mapping[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    options = parse(arguments)
    try:
        run(options, Show(quiet=options.quiet))
    except DeltawError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="demo.py", description="A small language model learns to answer questions in SQL."
    )
    parser.add_argument(
        "--full", action="store_true", help=f"ask all {ALL_QUESTIONS} questions of each split"
    )
    parser.add_argument("--steps", type=int, default=RECIPE["max_steps"], help="training steps (%(default)s)")
    parser.add_argument("--questions", type=int, help=f"questions a split ({QUESTIONS})")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the training rows and the adapter (%(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="where it is saved (%(default)s)"
    )
    parser.add_argument("--model", default=MODEL, help="built-in name or folder of the base (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_args(arguments)
    if options.questions is None:
        options.questions = ALL_QUESTIONS if options.full else QUESTIONS
    if options.steps < 1 or not 1 <= options.questions <= ALL_QUESTIONS:
        parser.error(f"--steps is at least 1 and --questions from 1 to {ALL_QUESTIONS}")
    return options


def run(options: argparse.Namespace, show: Show) -> dict[str, Any]:
    """The whole story; returns what ``results.json`` holds.

    Raises:
        DeltawError: whatever goes wrong on the way, told shortly.
    """
    output = _output(options.output)
    seconds: dict[str, float] = {}
    recipe = {**RECIPE, "max_steps": options.steps}

    with _timed(seconds, "data"):
        splits = build(options.seed, TRAIN_ROWS, options.questions)
        questions = {split: splits[split] for split in TEST_SPLITS}
        _introduce(show, questions["both"][0])
        baseline = _baseline(splits["train"], questions)

    show.heading("1  The model")
    with _timed(seconds, "model"):
        from deltaw.provenance import versions
        from text_to_sql import demo_steps as steps

        with steps.telling(lambda text: show.say(text, "dim")):
            base, tokenizer = steps.load_base(options.model)
    _introduce_model(show, options.model, base)

    show.heading("2  Before training")
    few = {split: rows[:BEFORE_QUESTIONS] for split, rows in questions.items()}
    with _timed(seconds, "before"), show.counting("asking") as progress:
        outcomes = steps.measure(base, tokenizer, few, progress)
    before = steps.tally(outcomes)
    _tell_before(show, few, outcomes, before)

    show.heading("3  Training")
    show.say(_recipe_line(recipe))
    with _timed(seconds, "training"):
        learned = steps.train(
            base,
            tokenizer,
            splits["train"],
            recipe,
            base=options.model,
            seed=options.seed,
            seconds=TRAIN_SECONDS,
            output=output,
            stream=show.console.file,
            quiet=options.quiet,
        )
    trainable = "trainable params: {:,} || all params: {:,}".format(*learned.parameters)
    trainable += f" || trainable%: {100 * learned.parameters[0] / learned.parameters[1]:.4f}"
    show.say(trainable)
    show.say(
        f"{len(learned.log)} steps in {clock(learned.seconds)}, loss {learned.log[-1]['loss']:.3f} at the end"
    )
    if learned.stopped is not None:
        show.say(
            f"stopped by the clock after step {learned.stopped} of {options.steps}: "
            f"training may take {TRAIN_SECONDS:.0f} s here",
            "yellow",
        )

    show.heading("4  Saved, and read back from disk")
    adapter = output / "adapter"
    with _timed(seconds, "reading back"):
        model, parity = steps.read_back(learned.model, tokenizer, splits["train"], adapter, options.model)
    sizes = {"adapter": steps.size_on_disk(adapter), "base": steps.size_on_disk(options.model, base)}
    show.say(f"the adapter on a fresh base is {parity}")
    show.say(
        f"the adapter takes {megabytes(sizes['adapter'])}, the base {megabytes(sizes['base'])}: "
        f"{sizes['base'] / sizes['adapter']:.0f} times as much"
    )

    show.heading("5  After training")
    with _timed(seconds, "after"), show.counting("asking") as progress:
        outcomes = steps.measure(model, tokenizer, questions, progress)
    after = steps.tally(outcomes)
    show.accuracies(after, before, baseline)
    show.say(
        f"{options.questions} questions a split ({min(BEFORE_QUESTIONS, options.questions)} before); "
        "no training: the nearest training question's SQL with the names swapped in",
        "dim",
    )
    examples = pick_examples(questions, outcomes)
    for one in examples:
        show.example(one)

    show.heading("6  Merged into the base")
    with _timed(seconds, "merging"), show.counting("asking") as progress:
        rows = questions[MERGED_SPLIT]
        merged = steps.merge(model, tokenizer, rows, MERGED_SPLIT, outcomes[MERGED_SPLIT], progress)
    show.merged(merged)

    facts = {
        "model": options.model,
        "seed": options.seed,
        "questions": options.questions,
        "train_rows": len(splits["train"]),
        "recipe": recipe,
        "steps": len(learned.log),
        "stopped_by_the_clock_at": learned.stopped,
        "trainable": trainable,
        "train_tokens": learned.tokens,
        "train_seconds": learned.seconds,
        "read_back": f"the adapter on a fresh base is {parity}",
        "adapter": str(adapter),
        "baseline": _plain(baseline),
        "before": _plain(before),
        "after": _plain(after),
        "merged": {
            "split": MERGED_SPLIT,
            **_plain({"apart": merged.apart, "together": merged.together}),
            "differing": merged.differing,
            "drift": vars(merged.drift),
        },
        "examples": [one._asdict() for one in examples],
        "log": learned.log,
        "sizes": sizes,
        "seconds": seconds,
        "versions": versions(),
        "machine": _machine(model),
    }
    _write_all(output, facts, baseline, before, after, learned, merged, examples)
    show.heading("Saved")
    for what, where in (
        ("adapter", adapter),
        ("report", output / "report.html"),
        ("numbers", output / "results.json"),
    ):
        show.copyable(f"{what:<8} {where}")
    show.seconds(seconds)
    show.heading("Go on")
    held_out = questions["table"][0]["prompt"]
    show.chat(_program(), str(adapter), held_out[0]["content"], held_out[-1]["content"])
    return facts


def pick_examples(questions: Splits, outcomes: Mapping[str, Sequence[Outcome]]) -> list[Example]:
    """One question a split, each of another kind, and one failure among them if there is any."""

    def shown(split: str, n: int) -> Example:
        row, found = questions[split][n], outcomes[split][n]
        returned = rows_text(found.rows, found.error)
        question, right = row["prompt"][-1]["content"], found.status == "correct"
        return Example(split, found.kind, question, found.sql, returned, right, found.gold)

    failing = next(  # in the hardest split that has one
        (split for split in reversed(list(outcomes)) if any(o.status != "correct" for o in outcomes[split])),
        None,
    )
    picked: list[Example] = []
    kinds: set[str] = set()
    for split, found in outcomes.items():
        # the first that is as right or wrong as it should be, and of a kind not shown yet
        best = min(
            range(len(found)),
            key=lambda n: ((found[n].status == "correct") == (split == failing), found[n].kind in kinds, n),
        )
        picked.append(shown(split, best))
        kinds.add(found[best].kind)
    return picked


# --- the small steps ----------------------------------------------------------------------------------------


def _output(folder: Path) -> Path:
    """The folder, made; what can only fail at the end is tried now."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file: name a folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "examples", "drawing the demo's report")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def _introduce(show: Show, row: Mapping[str, Any]) -> None:
    schema = row["prompt"][0]["content"].partition("(")[2].rstrip(")")
    columns = [column.split()[0] for column in schema.split(", ")]
    show.task(row, execute(f"select * from {row['table']} limit 3"), columns)
    show.say("A question and the columns of one table go in, one SQL query comes out.")
    show.say("It is right when it returns the same rows as the reference query, on real tables.")


def _baseline(train: Sequence[Mapping[str, Any]], questions: Splits) -> dict[str, Score]:
    nearest = Baseline(train)
    found = {split: score([nearest.answer(row) for row in rows], rows) for split, rows in questions.items()}
    from text_to_sql.demo_steps import tally  # loads torch: after the first lines are on the screen

    return tally({split: one.outcomes for split, one in found.items()})


def _introduce_model(show: Show, name: str, base: Any) -> None:
    from deltaw.loading import BUILT_IN, resolve_model

    origin = BUILT_IN.get(name)
    where = "" if origin is None else f", from {origin.package} {origin.version} on PyPI ({origin.licence})"
    count = sum(parameter.numel() for parameter in base.parameters())
    show.say(f"{name}: {count / 1e6:,.0f} million parameters{where}")
    show.say(f"kept in {resolve_model(name)}", "dim")


def _tell_before(
    show: Show, few: Splits, outcomes: Mapping[str, Sequence[Outcome]], before: Mapping[str, Score]
) -> None:
    right = sum(one.right for one in before.values())
    total = sum(one.total for one in before.values())
    shares = ", ".join(f"{SPLIT_NAMES[split]} {one.value:.0%}" for split, one in before.items())
    show.say(f"{right} of {total} right: {shares}")
    wrong = next((one for one in outcomes["wording"] if one.status != "correct"), None)
    if wrong is not None:
        row = few["wording"][outcomes["wording"].index(wrong)]
        answer = " ".join(wrong.sql.split())
        show.say(f"asked: {row['prompt'][-1]['content']}", "dim")
        show.say(f"it says: {answer[:150]}{' ...' if len(answer) > 150 else ''}", "dim")


def _recipe_line(recipe: Mapping[str, Any]) -> str:
    return (
        f"LoRA, rank {recipe['r']}, alpha {recipe['lora_alpha']}, on {recipe['target_modules']}; "
        f"{recipe['max_steps']} steps of {recipe['per_device_train_batch_size']} examples, "
        f"learning rate {recipe['learning_rate']:g}"
    )


def _plain(scores: Mapping[str, Score]) -> dict[str, dict[str, float | int]]:
    return {name: one.as_dict() for name, one in scores.items()}


def _machine(model: Any) -> dict[str, Any]:
    import torch

    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    return {
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "dtype": str(parameter.dtype),
    }


def _write_all(output: Path, facts: Mapping[str, Any], *results: Any) -> None:
    """``results.json`` and ``report.html``, each whole or not at all."""
    from deltaw.report import save_page
    from text_to_sql.demo_page import report

    baseline, before, after, learned, merged, examples = results
    save_page(output / "results.json", json.dumps(_finite(facts), indent=2, ensure_ascii=False) + "\n")
    page = report(
        facts,
        baseline=baseline,
        before=before,
        after=after,
        learned=learned,
        merged=merged,
        examples=examples,
    )
    page.save(output / "report.html")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _program() -> str:
    """How ``deltaw`` is called from here: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("deltaw")
    if not beside.exists():
        return shutil.which("deltaw") or f"{sys.executable} -m deltaw.cli"
    inside = beside.is_relative_to(Path.cwd())
    return os.path.relpath(beside) if inside else str(beside)


if __name__ == "__main__":
    sys.exit(main())
