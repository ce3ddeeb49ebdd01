"""The baseline without training for the hard set: `baseline`, over pairs of tables.

A pair is one table to it, with the columns of both; the join is taken out of a training query and put back with this
pair's names. It knows the months by name, and nothing of how the questions were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .baseline import Baseline
from .hard_wordings import MONTH_NAMES
from .pairs import PAIRS, Pair, cells
from .tables import Column, Table

__all__ = ["HardBaseline"]

Row = Mapping[str, Any]
_PAIRS = {pair.name: pair for pair in PAIRS}


def _as_one(pair: Pair) -> Table:
    return replace(pair.child, columns=(*pair.child.columns, *pair.parent.columns))


_TABLES = {name: _as_one(pair) for name, pair in _PAIRS.items()}
_PAIR_OF = {_TABLES[name].name: pair for name, pair in _PAIRS.items()}


def _contents(table: Table, column: Column) -> Sequence[Any]:
    return [value for value in cells(_PAIR_OF[table.name], column) if value is not None]


class HardBaseline:
    """Answers questions from training rows; reads them once.

    Args:
        train: rows of the hard set's ``train`` split.
    """

    def __init__(self, train: Sequence[Row]) -> None:
        self.inner = Baseline([_without_join(row) for row in train], _TABLES, _contents)

    def answer(self, row: Row) -> str:
        """The SQL for a row's question; its gold SQL is not looked at."""
        found = self.inner.nearest(row)
        if found is None:
            return ""
        sql, pair = self.inner.answer(row), _PAIRS[row["table"]]
        (example, _), _ = found
        here = _month(row)
        if here and (there := _month(example)):
            sql = sql.replace(f"= '{there}'", f"= '{here}'")
        source = example["from"]
        if source == "joined":
            return sql.replace(f"from {pair.child.name}", f"from {pair.joined}")
        return sql if source == "child" else sql.replace(f"from {pair.child.name}", f"from {pair.parent.name}")


def _without_join(row: Row) -> Row:
    pair = _PAIRS.get(row["table"])
    if pair is None:
        return row
    if pair.joined in row["sql"]:
        return {**row, "sql": row["sql"].replace(pair.joined, pair.child.name), "from": "joined"}
    of_parent = f"from {pair.parent.name}" in row["sql"]
    return {**row, "from": "parent" if of_parent else "child"}


def _month(row: Row) -> str:
    """The two digits of the month that a question names."""
    words = row["prompt"][-1]["content"].replace("?", " ").replace(".", " ").replace(",", " ").split()
    return next((f"{MONTH_NAMES.index(word) + 1:02}" for word in words if word in MONTH_NAMES), "")
