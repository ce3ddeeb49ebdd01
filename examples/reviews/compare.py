"""Three ways to one classifier, beside two that need no language model: trains, asks, and prints the table.

    cd examples && python -m reviews.compare [--train-rows 4000] [--test-rows 1000] [--steps 250] [--out FILE]

Each finished way is written to ``--out`` at once and is not run again: the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from deltaw import load_model, load_tokenizer
from deltaw.atomic import write_text
from deltaw.errors import DeltawError
from deltaw.evaluate import Score

from .chat import label_by_likelihood, train_chat
from .data import Reviews, split_reviews
from .encoder import classify, find_encoder, load_encoder, train_encoder
from .plain import majority, tfidf

__all__ = ["WAYS", "Settings", "main", "show"]


@dataclass(frozen=True)
class Settings:
    """One run. ``encoder`` is None for the packaged MiniLM."""

    model: str = "smollm2-135m"
    encoder: str | None = None
    train_rows: int = 4000
    test_rows: int = 1000
    steps: int = 250
    seed: int = 0
    quiet: bool = False


Answers = tuple[list[int], int]  # the labels, and how many parameters were trained


def _majority(reviews: Reviews, settings: Settings) -> Answers:
    return majority(reviews.train, reviews.test), 0


def _tfidf(reviews: Reviews, settings: Settings) -> Answers:
    return tfidf(reviews.train, reviews.test)


def _chat_base(reviews: Reviews, settings: Settings) -> Answers:
    return label_by_likelihood(*_chat(settings), reviews.test), 0


def _chat_lora(reviews: Reviews, settings: Settings) -> Answers:
    model, tokenizer = _chat(settings)
    with tempfile.TemporaryDirectory() as folder:
        adapted = train_chat(
            model,
            tokenizer,
            reviews.train,
            steps=settings.steps,
            seed=settings.seed,
            base=settings.model,
            output=Path(folder),
            quiet=settings.quiet,
        )
    return label_by_likelihood(adapted, tokenizer, reviews.test), adapted.get_nb_trainable_parameters()[0]


def _encoder_lora(reviews: Reviews, settings: Settings) -> Answers:
    model, tokenizer = load_encoder(settings.encoder or find_encoder(), settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        train_encoder(model, tokenizer, reviews.train, steps=settings.steps, seed=settings.seed, output=Path(folder))
    return classify(model, tokenizer, reviews.test), model.get_nb_trainable_parameters()[0]


def _chat(settings: Settings) -> tuple[Any, Any]:
    model = load_model(settings.model).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model, load_tokenizer(settings.model)


@dataclass(frozen=True)
class Way:
    """A classifier: what it is called, and what runs it."""

    title: str
    answer: Callable[[Reviews, Settings], Answers]


WAYS: dict[str, Way] = {
    "majority": Way("the larger class", _majority),
    "tfidf": Way("tf-idf and logistic regression", _tfidf),
    "chat": Way("chat model as it is, by likelihood", _chat_base),
    "chat-lora": Way("chat model with LoRA, by likelihood", _chat_lora),
    "encoder-lora": Way("MiniLM with LoRA and a head", _encoder_lora),
}


def show(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: accuracy with its 95% interval, parameters trained, and what it took."""
    lines = ["| way | accuracy | 95% interval | trained | seconds |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, way in WAYS.items():
        for run in (run for run in found if run["way"] == name):
            score = Score(name, run["right"], run["total"])
            low, high = score.interval
            lines.append(
                f"| {way.title} | {100 * score.value:.1f}% | {100 * low:.1f} to {100 * high:.1f} | "
                f"{run['trained']:,} | {run['seconds']:,.0f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    usual = Settings()
    parser = argparse.ArgumentParser(prog="python -m reviews.compare", description="Film reviews, three ways.")
    add = parser.add_argument
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    add("--train-rows", type=int, default=usual.train_rows, help="reviews to train on (%(default)s)")
    add("--test-rows", type=int, default=usual.test_rows, help="reviews to test on (%(default)s)")
    add("--steps", type=int, default=usual.steps, help="of each training (%(default)s)")
    add("--seed", type=int, default=usual.seed, help="of the training reviews and the adapters (%(default)s)")
    add("--model", default=usual.model, help="chat model: built-in name or folder (%(default)s)")
    add("--encoder", help="folder of the encoder; unset: the packaged MiniLM")
    add("--out", type=Path, default=Path("runs/reviews.json"), help="finished ways (%(default)s)")
    add("--quiet", action="store_true", help="draw no progress")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps is at least 1")
    named = {key: value for key, value in vars(options).items() if key not in ("ways", "out")}
    settings = Settings(**named)
    key = {name: value for name, value in named.items() if name != "quiet"}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found: list[dict[str, Any]] = json.loads(options.out.read_text()) if options.out.exists() else []
    try:
        reviews = split_reviews(settings.train_rows, settings.test_rows, settings.seed)
        films = reviews.films
        print(
            f"{len(reviews.train):,} reviews of {films[0]} films to train on, "
            f"{len(reviews.test):,} of {films[1]} other films to test on",
            file=sys.stderr,
        )
        for way in options.ways:
            this = {**key, "way": way}
            if any(this.items() <= run.items() for run in found):
                continue
            began = time.perf_counter()
            answers, trained = WAYS[way].answer(reviews, settings)
            right = [int(a == one.label) for a, one in zip(answers, reviews.test, strict=True)]
            facts = {"right": sum(right), "total": len(right), "trained": trained, "marks": right}
            found.append({**this, **facts, "seconds": time.perf_counter() - began})
            write_text(options.out, json.dumps(found) + "\n")  # at once: a training takes minutes
    except DeltawError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(show([run for run in found if key.items() <= run.items() and run["way"] in options.ways]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
