"""Six kinds of question: samples a query over a table, and asks for it in words.

One canonical SQL style: lower case, no aliases, no semicolon. A sampled query may still be unfit (empty, not
unique); :func:`sound` says so from the rows it returns. Knows nothing of splits, scoring or models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor

from .tables import Column, Table, Value, values
from .wordings import Wordings

__all__ = ["KINDS", "Query", "ask", "equals", "sample", "short_number", "sound"]

AGGREGATES = ("avg", "sum", "min", "max")
MOST_LISTED = 15  # rows: a longer answer is no answer to "list the names of ..."
LONGEST_VALUE = 28  # characters of a text that a question quotes
MOST_GROUPS = 60


@dataclass(frozen=True)
class Condition:
    """``column op value``, the value as SQL and as it reads in a question."""

    column: Column
    op: str
    sql: str
    says: str

    def __str__(self) -> str:
        return f"{self.column.name} {self.op} {self.sql}"


@dataclass(frozen=True)
class Query:
    """One gold query and what a question must mention to mean it."""

    kind: str
    table: Table
    sql: str
    number: Column | None = None
    agg: str = ""
    category: Column | None = None
    label: Column | None = None
    where: Condition | None = None
    k: int = 0
    order: str = ""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns the SQL names."""
        named = (self.number, self.category, self.label, self.where and self.where.column)
        return tuple(c for c in named if c is not None)


def sample(kind: str, table: Table, rng: random.Random) -> Query | None:
    """A random query of a kind over a table, or None where the draw, or the table, does not allow one."""
    return _SAMPLERS[kind](table, rng)


def sound(query: Query, rows: Sequence[tuple]) -> bool:
    """Whether the rows are one clear answer: some, none NULL, and in a list few and no two alike."""
    if not rows or any(value is None for row in rows for value in row):
        return False
    if query.kind in ("compare", "top"):
        return len(rows) <= MOST_LISTED and len(set(rows)) == len(rows)
    return rows != [(0,)] if query.kind == "count" else True


def ask(query: Query, wordings: Wordings, rng: random.Random) -> tuple[str, str]:
    """``(question, wording)``: the query in words, and the frame it was asked in."""
    frame = rng.choice(wordings.frames[query.kind])
    slots: dict[str, object] = {"rows": query.table.rows, "k": query.k}
    if query.number:
        slots["c"] = rng.choice(query.number.says)
    if query.category:
        slots["cat"] = rng.choice(query.category.says)
    if query.label:
        slots["label"] = query.label.plural
    if query.agg:
        slots["agg"] = rng.choice(wordings.aggs[query.agg])
    if query.order:
        slots["top"] = rng.choice(wordings.tops[query.order])
    if query.where:
        slots["where"] = _condition_words(query.where, wordings, rng)
    return frame.format(**slots), frame


def _condition_words(where: Condition, wordings: Wordings, rng: random.Random) -> str:
    column = rng.choice(where.column.says)
    if where.op == "=":
        return rng.choice(wordings.equal).format(c=column, x=where.says)
    op = rng.choice(wordings.ops[where.op]).format(x=where.says)
    return rng.choice(wordings.compare).format(c=column, op=op)


# -- sampling ------------------------------------------------------------------------------------------------


def _aggregate(table: Table, rng: random.Random) -> Query | None:
    number, agg = _measure(table, rng)
    return Query("aggregate", table, f"select {agg}({number.name}) from {table.name}", number, agg)


def _filter(table: Table, rng: random.Random) -> Query | None:
    number, agg = _measure(table, rng)
    where = _condition(table, rng, besides=number)
    if where is None:
        return None
    sql = f"select {agg}({number.name}) from {table.name} where {where}"
    return Query("filter", table, sql, number, agg, where=where)


def _count(table: Table, rng: random.Random) -> Query | None:
    where = _condition(table, rng)
    if where is None:
        return None
    return Query("count", table, f"select count(*) from {table.name} where {where}", where=where)


def _compare(table: Table, rng: random.Random) -> Query | None:
    label = rng.choice(table.listed)
    size = len(values(table, label))
    where = _threshold(table, rng.choice(table.of_role("number")), rng, 1, min(12, size // 2))
    sql = f"select {label.name} from {table.name} where {where}"
    return Query("compare", table, sql, label=label, where=where)


def _top(table: Table, rng: random.Random) -> Query | None:
    label, number = rng.choice(table.listed), rng.choice(table.of_role("number"))
    k, order = rng.randint(2, 10), rng.choice(("asc", "desc"))
    ranked = sorted(values(table, number), key=float, reverse=order == "desc")[: k + 1]  # type: ignore[arg-type]
    if len(set(ranked)) <= k:  # a tie inside or at the edge leaves the answer open
        return None
    sql = f"select {label.name} from {table.name} order by {number.name} {order} limit {k}"
    return Query("top", table, sql, number, label=label, k=k, order=order)


def _group(table: Table, rng: random.Random) -> Query | None:
    categories = [c for c in table.of_role("category", "level") if len(set(values(table, c))) <= MOST_GROUPS]
    if not categories:
        return None
    category, (number, agg) = rng.choice(categories), _measure(table, rng)
    sql = f"select {category.name}, {agg}({number.name}) from {table.name} group by {category.name}"
    return Query("group", table, sql, number, agg, category)


_SAMPLERS: dict[str, Callable[[Table, random.Random], Query | None]] = {
    "aggregate": _aggregate,
    "filter": _filter,
    "count": _count,
    "compare": _compare,
    "top": _top,
    "group": _group,
}
KINDS: tuple[str, ...] = tuple(_SAMPLERS)


def _measure(table: Table, rng: random.Random) -> tuple[Column, str]:
    number = rng.choice(table.of_role("number"))
    return number, rng.choice([a for a in AGGREGATES if a != "sum" or number.adds])


def equals(column: Column, value: Value) -> Condition | None:
    """``column = value``; None where the value is too long to be said, or would have to be quoted."""
    if isinstance(value, str):
        return None if len(value) > LONGEST_VALUE or "'" in value else Condition(column, "=", f"'{value}'", value)
    return Condition(column, "=", str(value), str(value))


def _condition(table: Table, rng: random.Random, besides: Column | None = None) -> Condition | None:
    """A condition that keeps part of the table, on another column than ``besides``."""
    equal = table.of_role("category", "level")
    numbers = [c for c in table.of_role("number") if c is not besides]
    if equal and (not numbers or rng.random() < 0.6):
        column = rng.choice(equal)
        return equals(column, rng.choice(values(table, column)))
    if not numbers:
        return None
    size = len(values(table, numbers[0]))
    return _threshold(table, rng.choice(numbers), rng, max(1, size // 10), size - max(1, size // 10))


def _threshold(table: Table, column: Column, rng: random.Random, least: int, most: int) -> Condition:
    """A comparison that about ``least`` to ``most`` rows pass, with a number short enough to be said."""
    op = rng.choices((">", "<", ">=", "<="), weights=(7, 7, 3, 3))[0]
    ranked = sorted(values(table, column), key=float, reverse=op.startswith(">"))  # type: ignore[arg-type]
    place = rng.randint(least, max(least, most))
    low, high = sorted((float(ranked[place - 1]), float(ranked[place])))  # type: ignore[arg-type]
    text = short_number(low, high)
    return Condition(column, op, text, text)


def short_number(low: float, high: float) -> str:
    """The decimal number in ``[low, high]`` with the fewest digits after rounding."""
    for digits in range(-5, 9):
        number = round(floor(high * 10.0**digits) / 10.0**digits, max(digits, 0))
        if low <= number <= high:
            return str(int(number)) if number == int(number) else repr(number)
    return repr(high)
