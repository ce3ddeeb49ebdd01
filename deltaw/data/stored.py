"""Many rows with little memory: kept in a temporary file, joined and chosen from without being copied.

Knows nothing of what rows mean. A million short rows as Python objects take half a gigabyte; here they take the 8 bytes
a row that say where it is. Few rows stay a list.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from deltaw.data.rows import Row, SequenceOfRows

__all__ = ["RowStore", "joined", "pick"]

IN_MEMORY = 50_000  # rows that stay a list
_AT_ONCE = 1 << 20  # bytes read at once when all rows are wanted


class _Rows(SequenceOfRows):
    """A sequence that is given by its length and one row at a time."""

    @abstractmethod
    def row(self, index: int) -> Any:
        """The row at an index from 0."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return pick(self, range(*index.indices(len(self))))
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"row {index} of {n}")
        return self.row(int(index) % n)


class _Stored(_Rows):
    """Rows in a file without a name, which is gone with this object, or with the process however it ends."""

    def __init__(self, file: Any, offsets: array[int]) -> None:
        self._file = file
        self._offsets = offsets
        weakref.finalize(self, file.close)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, index: int) -> Row:
        start, end = self._offsets[index], self._offsets[index + 1]
        return _read(os.pread(self._file.fileno(), end - start, start))

    def __iter__(self) -> Iterator[Row]:
        first = 0
        while first < len(self):
            last = first + 1
            start = self._offsets[first]
            while last < len(self) and self._offsets[last + 1] - start <= _AT_ONCE:
                last += 1
            held = memoryview(os.pread(self._file.fileno(), self._offsets[last] - start, start))
            for i in range(first, last):
                yield _read(held[self._offsets[i] - start : self._offsets[i + 1] - start])
            first = last


class _Joined(_Rows):
    """The rows of several sequences in turn."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, index: int) -> Any:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - int(self._ends[part])]  # counted from the end of its part

    def __iter__(self) -> Iterator[Any]:
        return (row for part in self._parts for row in part)


class _Chosen(_Rows):
    """Some rows of another sequence, in an order of their own."""

    def __init__(self, rows: Sequence[Any], indices: np.ndarray) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def row(self, index: int) -> Any:
        return self._rows[int(self._indices[index])]


class RowStore:
    """Rows as they are read: a list while they are few, a file when they are many."""

    def __init__(self) -> None:
        self._few: list[Row] = []
        self._file: Any = None
        self._offsets = array("q", [0])

    def add(self, row: Row) -> None:
        """One more row."""
        self._few.append(row)
        if len(self._few) > IN_MEMORY:
            self._spill()

    def rows(self) -> Sequence[Row]:
        """All of them; nothing can be added any more."""
        if self._file is None:
            return self._few
        self._spill()
        self._file.flush()
        return _Stored(self._file, self._offsets)

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=_AT_ONCE)  # noqa: SIM115, it lives as long as its rows
        for row in self._few:
            written = pickle.dumps((dict(row), row.file, row.line), protocol=pickle.HIGHEST_PROTOCOL)
            self._file.write(written)
            self._offsets.append(self._offsets[-1] + len(written))
        self._few = []


def joined(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """The rows of all parts in turn."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list) for part in parts):
        return [row for part in parts for row in part]
    return _Joined(parts)


def pick(rows: Sequence[Any], indices: Iterable[int]) -> Sequence[Any]:
    """The rows at these indices, in this order."""
    if isinstance(rows, list):
        return [rows[i] for i in indices]
    return _Chosen(rows, np.fromiter(indices, np.int64))


def _read(written: Any) -> Row:
    return Row(*pickle.loads(written))  # written by this process, to a file that no other can open
