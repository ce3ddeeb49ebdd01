"""Draws queries, none twice and evenly over the places they ask, and makes training rows of them.

Knows nothing of what a place is (a table, a pair of tables) nor of what is asked there.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import cycle
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Draw", "training_rows"]

Row = dict[str, Any]
TRIES = 60  # draws until a place has nothing new to give
MOST_STALE = 4000  # training questions in a row that were all asked before


class Place(Protocol):
    """Where queries are drawn from."""

    @property
    def name(self) -> str: ...


class Drawn(Protocol):
    """What is drawn."""

    @property
    def sql(self) -> str: ...


P = TypeVar("P", bound=Place)
Q = TypeVar("Q", bound=Drawn)


class Draw(Generic[P, Q]):
    """Draws sound queries, none twice, from the place least used for the kind.

    Args:
        rng: of all draws.
        places: where to draw from.
        sample: a query of a kind at a place, or None where the draw gave none.
        sound: whether a query may be asked; it is looked at once.
        others: the kinds that stand in for one that is spent.
        banned: SQL that is not drawn.
        again: draws from a place that is spent, when a query may repeat one.
    """

    def __init__(
        self,
        rng: random.Random,
        places: Sequence[P],
        sample: Callable[[str, P, random.Random], Q | None],
        sound: Callable[[Q], bool],
        others: Callable[[str], list[str]],
        banned: Collection[str] = (),
        *,
        again: int,
    ) -> None:
        self.rng = rng
        self.places = places
        self.sample = sample
        self.sound = sound
        self.others = others
        self.banned = frozenset(banned)
        self.again = again
        self.used: Counter[tuple[str, str]] = Counter()
        self.taken: set[str] = set()
        self.spent: set[tuple[str, str]] = set()  # (kind, place) that gave nothing new in TRIES draws
        self.known: dict[str, bool] = {}  # SQL -> whether it is sound

    def query(self, kind: str, again: bool = False) -> Q:
        """A query of the kind, of another kind where that is spent; with ``again`` it may repeat one.

        Raises:
            ValueError: no place gives another query.
        """
        others = self.others(kind)
        for wanted in (kind, *self.rng.sample(others, len(others))):
            for place in sorted(self.places, key=lambda p: (self.used[wanted, p.name], self.rng.random())):
                found = self._from(wanted, place, again)
                if found is not None:
                    self.used[wanted, place.name] += 1
                    self.taken.add(found.sql)
                    return found
        raise ValueError(f"drawing query {len(self.taken) + 1} ({kind}): the tables give no more; ask for fewer")

    def _from(self, kind: str, place: P, again: bool) -> Q | None:
        here, repeat = (kind, place.name), None
        if here in self.spent and not again:
            return None
        for _ in range(self.again if here in self.spent else TRIES):
            query = self.sample(kind, place, self.rng)
            if query is None or query.sql in self.banned or not self._sound(query):
                continue
            if query.sql not in self.taken:
                return query
            repeat = query
        self.spent.add(here)
        return repeat if again else None

    def _sound(self, query: Q) -> bool:
        if query.sql not in self.known:
            self.known[query.sql] = self.sound(query)
        return self.known[query.sql]


def training_rows(size: int, kinds: Iterable[str], row: Callable[[str], Row], rng: random.Random) -> list[Row]:
    """``size`` rows, kinds in turns, no question with its answer twice; in an order drawn by ``rng``.

    Raises:
        ValueError: so many questions there are not.
    """
    rows: list[Row] = []
    asked: set[tuple[str, str]] = set()
    stale, turns = 0, cycle(kinds)
    while len(rows) < size:
        made = row(next(turns))
        key = (made["sql"], made["prompt"][-1]["content"])
        if key not in asked:
            asked.add(key)
            rows.append(made)
            stale = 0
        elif (stale := stale + 1) > MOST_STALE:
            raise ValueError(f"building train={size}: only {len(rows)} questions found; ask for fewer")
    rng.shuffle(rows)
    return rows
