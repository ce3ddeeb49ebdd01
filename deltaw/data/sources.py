"""Several sources of rows -> one set, with weights where they are given. Knows nothing of files or formats.

Weights are shares of draws. A set of N rows takes N times its share from each source: a source with more rows than
that gives a sample without replacement; one with fewer gives all its rows as often as they fit, and the rest as a
sample without replacement. So no row comes twice before every row of its source has come once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.data.stored import joined, pick
from deltaw.errors import DataError

__all__ = ["Drawn", "mix"]


@dataclass(frozen=True)
class Drawn:
    """How often one source was drawn from."""

    name: str
    rows: int
    draws: int

    def __str__(self) -> str:
        if self.draws <= self.rows:
            return f"{self.name}: {self.draws:,} of {self.rows:,} rows"
        return f"{self.name}: {self.draws:,} draws from {self.rows:,} rows ({self.draws / self.rows:.2f} passes)"


def mix(
    sources: Sequence[Sequence[Any]],
    weights: Sequence[float],
    *,
    names: Sequence[str] | None = None,
    total: int | None = None,
    seed: int = 0,
) -> tuple[Sequence[Any], list[Drawn]]:
    """Rows drawn from several sources in proportion to their weights, in an order drawn too.

    Args:
        sources: the rows of each.
        weights: one for each source, above 0; only their proportions count.
        names: of the sources, for the counts.
        total: how many rows; None: as many as all sources have together.
        seed: of the draws and of the order.

    Returns:
        The rows (not copied, where they are kept in a file), and how many each source gave.

    Raises:
        DataError: other than one positive weight for each source, or a source without rows.
    """
    if len(weights) != len(sources) or not all(weight > 0 for weight in weights):
        raise DataError(f"{len(sources)} source(s) need as many weights above 0, not {list(weights)}")
    labels = [f"source {i + 1}" for i in range(len(sources))] if names is None else list(names)
    if empty := [name for name, rows in zip(labels, sources, strict=True) if not rows]:
        raise DataError(f"nothing can be drawn from {empty}: no rows")
    shares = _whole([weight / sum(weights) for weight in weights], sum(map(len, sources)) if total is None else total)
    rng = random.Random(seed)
    drawn: list[int] = []  # places among all rows
    first = 0
    for source, share in zip(sources, shares, strict=True):
        here = range(first, first + len(source))
        drawn += list(here) * (share // len(source))
        drawn += rng.sample(here, share % len(source))
        first += len(source)
    rng.shuffle(drawn)
    return pick(joined(sources), drawn), [
        Drawn(n, len(s), share) for n, s, share in zip(labels, sources, shares, strict=True)
    ]


def _whole(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in these proportions whose sum is `total`: what rounding down leaves goes to the largest rests."""
    exact = [share * total for share in shares]
    whole = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_rest[: total - sum(whole)]:
        whole[i] += 1
    return whole
