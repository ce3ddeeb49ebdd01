"""A row, and where it came from. Knows nothing of files or of what rows mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deltaw.errors import DataError

__all__ = [
    "Fault", "Row", "SequenceOfRows", "Unrendered", "as_rows", "class_names", "from_columns", "raise_faults", "where",
]  # fmt: skip

SHOWN_FAULTS = 5


class Row(dict[str, Any]):
    """A row that remembers its file and line, through sampling, mixing and other processes.

    Attributes:
        file: where it was read.
        line: the first line of it there, counted from 1; in files without lines, the number of the row.
    """

    __slots__ = ("file", "line")

    def __init__(self, values: Mapping[str, Any], file: str, line: int) -> None:
        super().__init__(values)
        self.file = file
        self.line = line

    @property
    def where(self) -> str:
        """``file:line``."""
        return f"{self.file}:{self.line}"


class SequenceOfRows(Sequence[Row]):
    """What is rows already and need not be copied into a list."""


class Fault(NamedTuple):
    """A place in a file that holds no row, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


def where(row: Any, index: int) -> str:
    """How errors name a row: its file and line, or its number where that is not known."""
    return row.where if isinstance(row, Row) else f"row {index}"


def raise_faults(act: str, faults: list[Fault]) -> None:
    """One DataError for all of them: how many, and what is wrong with the first five."""
    if faults:
        raise DataError(f"{act} has {len(faults)} broken row(s):{_listed([*map(str, faults)], len(faults))}")


@dataclass
class Unrendered:
    """Rows that cannot be rendered: how many, and what is wrong with the first five."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, row: Any, index: int, error: DataError) -> None:
        """One more."""
        self.count += 1
        if len(self.shown) < SHOWN_FAULTS:
            self.shown.append(f"{where(row, index)}: {error}")

    def join(self, later: Unrendered) -> None:
        """Those of the rows that follow."""
        self.count += later.count
        self.shown = [*self.shown, *later.shown][:SHOWN_FAULTS]

    def raise_if_any(self, rows: int) -> None:
        """One DataError for all of them, out of ``rows`` rows."""
        if self.count:
            raise DataError(f"{self.count} of {rows} rows cannot be rendered:{_listed(self.shown, self.count)}")


def _listed(said: list[str], count: int) -> str:
    """The first few, a line each, and how many more there are."""
    lines = said[:SHOWN_FAULTS]
    more = [f"... and {count - len(lines)} more"] if count > len(lines) else []
    return "".join(f"\n  {line}" for line in [*lines, *more])


def as_rows(dataset: Any) -> Sequence[dict[str, Any]]:
    """A list of dicts, a `datasets.Dataset`, a data frame, or any sequence of mappings, as a list of dicts.

    What `load_rows` gives stays as it is. Classes that a `datasets.Dataset` keeps as numbers are given by their names.

    Raises:
        DataError: a dict of splits or of columns, a string, or elements that are not mappings.
    """
    if isinstance(dataset, SequenceOfRows):
        return dataset
    if isinstance(dataset, str | os.PathLike):
        raise DataError(f"{os.fspath(dataset)!r} is a name, not rows: read it with load_rows first")
    if isinstance(dataset, Mapping):
        keys = [str(key) for key in dataset]
        raise DataError(f"rows must be a list of dicts, not a mapping of {keys}: pick one split, or zip the columns")
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):  # a pandas data frame
        return dataset.to_dict("records")
    if isinstance(dataset, Iterable):
        rows: list[Any] = list(dataset)
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):  # a torch map-style data set
        rows = [dataset[i] for i in range(len(dataset))]
    else:
        raise DataError(f"rows must be a sequence of mappings, not {type(dataset).__name__}")
    bad = [i for i, row in enumerate(rows) if not isinstance(row, Mapping)]
    if bad:
        kind = type(rows[bad[0]]).__name__
        raise DataError(f"{len(bad)} of {len(rows)} rows are not mappings; row {bad[0]} is a {kind}")
    if columns := getattr(dataset, "features", None):
        read = from_columns(class_names(columns))
        return [read(row) for row in rows]
    return [row if isinstance(row, Row) else dict(row) for row in rows]


def class_names(features: Any) -> dict[str, list[str]]:
    """The columns of a `datasets` schema that hold classes, each with the names of its numbers."""
    items = features.items() if isinstance(features, Mapping) else ()
    return {column: list(kind.names) for column, kind in items if type(kind).__name__ == "ClassLabel"}


def _pruned(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the keys that a columnar table adds to nested mappings, with None, where they lack them."""
    return {key: _without_nulls(value) if isinstance(value, list | dict) else value for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def from_columns(classes: Mapping[str, list[str]]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that makes a row of a columnar table what it was: classes by name (-1, which means none, as None),
    and nested mappings without the keys that the columns added."""

    def read(row: Mapping[str, Any]) -> dict[str, Any]:
        changed = _pruned(row)
        for column, names in classes.items():
            value = changed.get(column)
            if isinstance(value, int):
                if not -1 <= value < len(names):
                    raise DataError(f"{column} is {value}, and its classes are {names}")
                changed[column] = None if value < 0 else names[value]
        return changed

    return read
