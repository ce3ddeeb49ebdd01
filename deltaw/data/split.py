"""Rows -> those to train on and those held out, by share, and by group where rows belong together.

Knows nothing of formats or files. A film, a table or an author on both sides lets a model answer from memory, so a
group is never divided.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.data.rows import where
from deltaw.errors import DataError, did_you_mean

__all__ = ["Split", "split_rows"]

_WINDOW = 4096  # rows of the share that are filled exactly; those before are filled group by group
_SHOWN = 5


@dataclass(frozen=True)
class Split:
    """The indices of both sides, in order, and what was done, for people."""

    train: list[int]
    held_out: list[int]
    told: str


def split_rows(
    rows: Sequence[Mapping[str, Any]], share: float, *, seed: int = 0, group_column: str | None = None
) -> Split:
    """Hold out a share of the rows, drawn by the seed.

    Args:
        rows: all of them.
        share: above 0 and below 1; at least one row is held out.
        seed: of the draw.
        group_column: rows with the same value in it stay on one side. Groups are drawn until the share is reached as
            closely as their sizes allow.

    Raises:
        DataError: too few rows or groups for two sides; a column that is not there, or is null in some rows.
    """
    if not 0 < share < 1:
        raise DataError(f"the share to hold out must be above 0 and below 1, not {share}")
    if len(rows) < 2:
        raise DataError(f"{len(rows)} row(s) cannot be split into two sides")
    wanted = min(max(1, round(share * len(rows))), len(rows) - 1)
    if group_column is None:
        chosen = set(random.Random(seed).sample(range(len(rows)), wanted))
        told = f"held out {wanted:,} of {len(rows):,} rows ({wanted / len(rows):.1%})"
    else:
        groups = _groups(rows, group_column)
        taken = _closest([len(members) for members in groups], wanted, seed)
        chosen = {index for group in taken for index in groups[group]}
        told = (
            f"held out {len(chosen):,} of {len(rows):,} rows ({len(chosen) / len(rows):.1%}, asked {share:.1%}): "
            f"{len(taken):,} of {len(groups):,} values of {group_column!r}, none of them on both sides"
        )
    return Split([i for i in range(len(rows)) if i not in chosen], sorted(chosen), told)


def _groups(rows: Sequence[Mapping[str, Any]], column: str) -> list[list[int]]:
    """The rows of each value, by first appearance."""
    keys = {key for row in rows for key in row}
    if column not in keys:
        raise DataError(f"val_group_column {column!r} is no column of the rows{did_you_mean(column, map(str, keys))}")
    groups: dict[Any, list[int]] = {}
    null = []
    for index, row in enumerate(rows):
        value = row.get(column)
        if value is None or value == "" or value != value:  # the last: not a number
            null.append(index)
        elif isinstance(value, str | int | float):
            groups.setdefault(value, []).append(index)
        else:
            kind = type(value).__name__
            raise DataError(f"{where(row, index)}: {column} is a {kind}; groups go by a name or a number")
    if null:
        shown = ", ".join(where(rows[i], i) for i in null[:_SHOWN]) + (", ..." if len(null) > _SHOWN else "")
        raise DataError(
            f"{column} is empty in {len(null):,} of {len(rows):,} rows ({shown}), so their side is unknown: "
            "fill it in, or leave these rows out"
        )
    if len(groups) < 2:
        raise DataError(f"all rows have the same {column}, so they cannot be split by it")
    return list(groups.values())


def _closest(sizes: list[int], wanted: int, seed: int) -> list[int]:
    """Groups, not all of them, whose sizes add up to `wanted` as closely as can be; which ones is up to the seed."""
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    taken: list[int] = []
    missing = wanted
    aside = []  # too large to be taken blindly
    while missing > _WINDOW and order:
        group = order.pop()
        if sizes[group] <= missing - _WINDOW // 2:
            taken.append(group)
            missing -= sizes[group]
        else:
            aside.append(group)
    order += aside
    # the rest exactly: by[s] is the last group of a choice, in order, that adds up to s
    most = 2 * missing + 1
    by = np.full(most + 1, -1)
    by[0] = len(sizes)
    before = np.zeros(most + 1, np.int64)
    for group in order:
        size = sizes[group]
        if size > most:
            continue
        new = np.flatnonzero((by[size:] < 0) & (by[: most + 1 - size] >= 0)) + size
        by[new] = group
        before[new] = new - size
        if by[missing] >= 0:
            break
    sums = np.flatnonzero(by >= 0)
    left = sum(sizes[group] for group in order)
    sums = sums[(sums > 0) | bool(taken)]
    sums = sums[sums < left] if sums.size else sums
    if not sums.size:  # every choice is far above the share: the smallest group comes nearest
        return [*taken, min(order, key=lambda group: (sizes[group], order.index(group)))]
    total = int(sums[np.argmin(abs(sums - missing))])
    while total:
        taken.append(int(by[total]))
        total = int(before[total])
    return taken
