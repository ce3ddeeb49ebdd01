"""Examples joined into rows of at most a given length, as full as possible. Knows nothing of tokens, labels or models.

Best-fit decreasing (Johnson et al. 1974, doi 10.1137/0203025): the longest example first, each into the fullest row
that still has room for it. Examples of one length are placed together, so the time is that of sorting. What keeps
examples apart inside a row is the business of the collator and of the attention.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deltaw.errors import DataError

__all__ = ["PackedDataset", "lengths_of", "pack"]


def pack(lengths: Sequence[int] | np.ndarray, max_length: int, seed: int = 0) -> list[np.ndarray]:
    """Which examples share a row.

    Args:
        lengths: tokens of each example.
        max_length: the most tokens of a row.
        seed: draws which of equally long examples meet, and the order of the rows.

    Returns:
        For each row the indices of its examples, int64, longest first; every example is in one row.

    Raises:
        DataError: an example that is empty or longer than ``max_length``.
    """
    sizes = np.asarray(lengths, np.int64)
    if not len(sizes):
        return []
    if sizes.min() < 1 or sizes.max() > max_length:
        worst = int(sizes.argmin() if sizes.min() < 1 else sizes.argmax())
        raise DataError(
            f"example {worst} has {sizes[worst]} tokens and cannot be packed into rows of {max_length}: "
            "raise max_length, or say with overlong what becomes of long examples"
        )
    random = np.random.default_rng([seed, len(sizes)])
    drawn = random.permutation(len(sizes))
    decreasing = drawn[np.argsort(-sizes[drawn], kind="stable")]
    row_of = _best_fit(sizes[decreasing], max_length)
    order = np.argsort(row_of, kind="stable")  # within a row still by decreasing length
    rows = np.split(decreasing[order], np.flatnonzero(np.diff(row_of[order])) + 1)
    return [rows[i] for i in random.permutation(len(rows))]


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each example; ``sizes`` decrease."""
    row_of = np.empty(len(sizes), np.int64)
    rooms: list[int] = []  # free places that some row has, ascending
    rows: dict[int, list[np.ndarray]] = {}  # free places -> the rows that have as many
    count = 0

    def give_back(free: int, which: np.ndarray) -> None:
        if free and len(which):
            if free not in rows:
                insort(rooms, free)
                rows[free] = []
            rows[free].append(which)

    ends = np.append(np.flatnonzero(np.diff(sizes)) + 1, len(sizes))
    begin = 0
    for end in ends.tolist():
        size = int(sizes[begin])
        while begin < end:
            where = bisect_left(rooms, size)
            free = rooms[where] if where < len(rooms) else capacity
            each = free // size  # having taken one, the row is the fullest with room for the next
            wanted = -(-(end - begin) // each)
            if where < len(rooms):
                held = np.concatenate(rows.pop(free))
                del rooms[where]
                taken, left = held[:wanted], held[wanted:]
                give_back(free, left)
            else:
                taken = np.arange(count, count + wanted)
                count += wanted
            placed = min(len(taken) * each, end - begin)
            row_of[begin : begin + placed] = np.repeat(taken, each)[:placed]
            begin += placed
            whole = placed // each
            give_back(free - each * size, taken[:whole])
            give_back(free - (placed - whole * each) * size, taken[whole:])
    return row_of


def lengths_of(dataset: Any) -> np.ndarray:
    """(n,) int64: tokens of each example, from the data set's own ``lengths`` where it has them."""
    known = getattr(dataset, "lengths", None)
    if isinstance(known, np.ndarray):
        return known
    return np.fromiter((len(example["input_ids"]) for example in dataset), np.int64, len(dataset))


class PackedDataset(Sequence[dict[str, list[int]]]):
    """A map-style data set of rows that are several examples of another one.

    Args:
        dataset: examples with ``input_ids`` and ``labels``.
        max_length: the most tokens of a row.
        seed: see :func:`pack`.

    Attributes:
        packs: for each row the indices of its examples.

    Raises:
        DataError: see :func:`pack`.
    """

    def __init__(self, dataset: Any, max_length: int, seed: int = 0) -> None:
        self.dataset = dataset
        self.max_length = max_length
        sizes = lengths_of(dataset)
        self.packs = pack(sizes, max_length, seed)
        #: (rows,) int64: tokens of each row
        self.lengths = np.array([sizes[members].sum() for members in self.packs], np.int64)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: Any) -> Any:
        """``input_ids`` and ``labels`` of all examples of a row, one after the other, and ``seq_lengths``, the tokens
        of each; a slice gives a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        examples: list[Mapping[str, Any]] = [self.dataset[int(i)] for i in self.packs[index]]
        return {
            "input_ids": [token for example in examples for token in example["input_ids"]],
            "labels": [label for example in examples for label in example["labels"]],
            "seq_lengths": [len(example["input_ids"]) for example in examples],
        }

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[i] for i in range(len(self)))

    @property
    def waste(self) -> float:
        """Share of the rows' places that stay empty."""
        return 1.0 - float(self.lengths.sum()) / max(1, len(self) * self.max_length)
