"""Four kinds of hard question over a pair of tables: a join, missing values, dates, conditions on groups.

Each kind has several forms. A sampled query may still be unfit: :func:`fit` says so from the rows it returns, and drops
the ones that a simpler query would answer too. Knows nothing of splits, scoring or models.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import fmean
from typing import Any

from .hard_wordings import MONTH_NAMES
from .pairs import Pair, cells, nullable
from .questions import AGGREGATES, MOST_GROUPS, MOST_LISTED, Condition, equals, short_number
from .tables import Column, Table

__all__ = ["FORMS", "HARD_KINDS", "HardQuery", "fit", "sample_hard"]

Rows = Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class HardQuery:
    """One gold query and what a question must mention to mean it.

    Attributes:
        kind, form: ``join``, ``null``, ``date`` or ``having``, and which form of it.
        pair: the tables that the question is about.
        table: the one whose rows it speaks of.
        sql: the query.
        rival: what is left when the hard part is forgotten; where it returns the same rows, the question tests nothing.
        slots: what the frame mentions: columns, words, values.
        where: the conditions, in their order.
    """

    kind: str
    form: str
    pair: Pair
    table: Table
    sql: str
    rival: str = ""
    slots: Mapping[str, Any] = field(default_factory=dict)
    where: tuple[Condition, ...] = ()

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that the SQL names."""
        named = set(re.findall(r"[a-z_]\w*", re.sub(r"'[^']*'", "", self.sql)))
        return tuple(c for table in self.pair.tables for c in table.columns if c.name in named)


def sample_hard(form: str, pair: Pair, rng: random.Random) -> HardQuery | None:
    """A random query of a form over a pair, or None where the draw, or the pair, does not allow one."""
    return _SAMPLERS[form](pair, rng)


def fit(query: HardQuery, rows: Rows, rival: Rows | None) -> bool:
    """Whether the rows are one clear answer, and not that of the simpler query.

    Args:
        rows: what the query returns.
        rival: what ``query.rival`` returns; None where there is none.
    """
    if not rows or any(value is None for row in rows for value in row):
        return False
    if rival is not None and Counter(rows) == Counter(rival):
        return False
    if query.form.endswith("_list"):
        return len(rows) <= MOST_LISTED and len(set(rows)) == len(rows)
    if query.form.endswith("_group") and len(rows) < 2:
        return False
    return rows != [(0,)] and len(rows) <= MOST_GROUPS


# -- sampling --------------------------------------------------------------------------------------------------


def _join_list(pair: Pair, rng: random.Random) -> HardQuery | None:
    label = rng.choice(pair.child.listed)
    far, near = _plain(pair, pair.parent, rng), _plain(pair, pair.child, rng, besides=label)
    where = (far,) if rng.random() < 0.25 else (far, near)
    return _query("join_list", pair, pair.child, label.name, where, pair.joined, far, label=label)


def _join_count(pair: Pair, rng: random.Random) -> HardQuery | None:
    far, near = _plain(pair, pair.parent, rng), _plain(pair, pair.child, rng)
    where = (far,) if rng.random() < 0.4 else (far, near)
    return _query("join_count", pair, pair.child, "count(*)", where, pair.joined, far)


def _join_aggregate(pair: Pair, rng: random.Random) -> HardQuery | None:
    number, agg = _measure(pair, rng)
    far, near = _plain(pair, pair.parent, rng), _plain(pair, pair.child, rng, besides=number)
    where = (far,) if rng.random() < 0.6 else (far, near)
    picked = f"{agg}({number.name})"
    return _query("join_aggregate", pair, pair.child, picked, where, pair.joined, far, c=number, agg=agg)


def _join_group(pair: Pair, rng: random.Random) -> HardQuery | None:
    number, agg = _measure(pair, rng)
    category = _grouping(pair, pair.parent, rng)
    if category is None:
        return None
    sql = f"select {category.name}, {agg}({number.name}) from {pair.joined} group by {category.name}"
    return HardQuery("join", "join_group", pair, pair.child, sql, slots={"c": number, "agg": agg, "cat": category})


def _null_list(pair: Pair, rng: random.Random) -> HardQuery | None:
    gap = _gap(pair, rng)
    if gap is None:
        return None
    table = pair.table_of(gap.column)
    labels = [column for column in table.listed if column is not gap.column]
    if not labels:
        return None
    label = rng.choice(labels)
    where = (gap,) if rng.random() < 0.2 else (gap, _plain(pair, table, rng, besides=gap.column))
    return _query("null_list", pair, table, label.name, where, table.name, gap, label=label)


def _null_count(pair: Pair, rng: random.Random) -> HardQuery | None:
    gap = _gap(pair, rng, present=0.35)
    if gap is None:
        return None
    table = pair.table_of(gap.column)
    where = (gap,) if rng.random() < 0.2 else (gap, _plain(pair, table, rng, besides=gap.column))
    return _query("null_count", pair, table, "count(*)", where, table.name, gap)


def _null_fill(pair: Pair, rng: random.Random) -> HardQuery | None:
    numbers = [c for c in pair.child.of_role("number") if nullable(pair, c)]
    if not numbers:
        return None
    number, value = rng.choice(numbers), rng.choice((0, 0, 0, 1, 5, 10, 50, 100))
    where = () if rng.random() < 0.2 else (_plain(pair, pair.child, rng, besides=number),)
    picked = f"avg(coalesce({number.name}, {value}))"
    query = _query("null_fill", pair, pair.child, picked, where, pair.child.name, None, z=number, x=str(value))
    return query and replace(query, rival=query.sql.replace(f"coalesce({number.name}, {value})", number.name))


def _null_group(pair: Pair, rng: random.Random) -> HardQuery | None:
    gap = _gap(pair, rng, present=0.5)
    if gap is None:
        return None
    table = pair.table_of(gap.column)
    category = _grouping(pair, table, rng, besides=gap.column)
    if category is None:
        return None
    head, tail = f"select {category.name}, count(*) from {table.name}", f"group by {category.name}"
    more = _plain(pair, table, rng, besides=gap.column) if rng.random() < 0.5 else None
    if more is not None and more.column is category:
        more = None
    where = (gap,) if more is None else (gap, more)
    sql = f"{head} where {' and '.join(map(_sql, where))} {tail}"
    return HardQuery("null", "null_group", pair, table, sql, f"{head} {tail}", {"cat": category}, where)


def _date_list(pair: Pair, rng: random.Random) -> HardQuery | None:
    date = _dated(pair, rng)
    if date is None:
        return None
    table = pair.table_of(date)
    labels = [c for c in table.columns if c.role in ("label", "category") and c is not date] or [date]
    label = rng.choice(labels if rng.random() < 0.5 else [date])
    when = _when(pair, date, rng)
    where = (when,) if rng.random() < 0.4 else (when, _plain(pair, table, rng, besides=label))
    return _query("date_list", pair, table, label.name, where, table.name, when, label=label)


def _date_count(pair: Pair, rng: random.Random) -> HardQuery | None:
    date = _dated(pair, rng)
    if date is None:
        return None
    table, when = pair.table_of(date), _when(pair, date, rng)
    where = (when,) if rng.random() < 0.3 else (when, _plain(pair, table, rng))
    return _query("date_count", pair, table, "count(*)", where, table.name, when)


def _date_aggregate(pair: Pair, rng: random.Random) -> HardQuery | None:
    date = _dated(pair, rng)
    if date is None or date not in pair.child.columns:
        return None
    (number, agg), when = _measure(pair, rng), _when(pair, date, rng)
    where = (when,) if rng.random() < 0.6 else (when, _plain(pair, pair.child, rng, besides=number))
    picked = f"{agg}({number.name})"
    return _query("date_aggregate", pair, pair.child, picked, where, pair.child.name, when, c=number, agg=agg)


def _date_group(pair: Pair, rng: random.Random) -> HardQuery | None:
    date = _dated(pair, rng)
    if date is None or date not in pair.child.columns:
        return None
    (number, agg), (name, mark) = _measure(pair, rng), rng.choice((("year", "%Y"), ("month", "%m")))
    part = f"strftime('{mark}', {date.name})"
    sql = f"select {part}, {agg}({number.name}) from {pair.child.name} group by {part}"
    slots = {"c": number, "agg": agg, "cat": f"{name} of the {date.says[0]}"}
    return HardQuery("date", "date_group", pair, pair.child, sql, slots=slots)


def _having_count(pair: Pair, rng: random.Random) -> HardQuery | None:
    far = rng.random() < 0.4
    category = _grouping(pair, pair.parent if far else pair.child, rng)
    if category is None:
        return None
    sizes = sorted(Counter(_groups(pair, category)).values())
    bound = _bound(sizes, rng)
    if bound is None:
        return None
    return _having("having_count", pair, category, "count(*)", bound, far, size=bound)


def _having_value(pair: Pair, rng: random.Random) -> HardQuery | None:
    far = rng.random() < 0.4
    category, (number, agg) = _grouping(pair, pair.parent if far else pair.child, rng), _measure(pair, rng)
    if category is None:
        return None
    by_group: dict[Any, list[float]] = defaultdict(list)
    for group, value in zip(_groups(pair, category), cells(pair, number), strict=True):
        if group is not None and value is not None:
            by_group[group].append(float(value))
    of = {"avg": fmean, "sum": sum, "min": min, "max": max}[agg]
    bound = _bound(sorted(of(each) for each in by_group.values()), rng)
    if bound is None:
        return None
    return _having("having_value", pair, category, f"{agg}({number.name})", bound, far, c=number, agg=agg, op=bound)


_SAMPLERS: dict[str, Callable[[Pair, random.Random], HardQuery | None]] = {
    name.removeprefix("_"): sampler
    for name, sampler in list(globals().items())
    if re.match(r"_(join|null|date|having)_", name)
}
#: the forms of each kind
FORMS: dict[str, tuple[str, ...]] = {
    kind: tuple(form for form in _SAMPLERS if form.startswith(kind)) for kind in ("join", "null", "date", "having")
}
HARD_KINDS: tuple[str, ...] = tuple(FORMS)


# -- parts of a query ------------------------------------------------------------------------------------------


def _sql(where: Condition) -> str:
    name = where.column.name
    if where.op in ("month", "year"):
        return f"strftime('{'%m' if where.op == 'month' else '%Y'}', {name}) = {where.sql}"
    return f"{name} {where.op} {where.sql}"


def _query(
    form: str,
    pair: Pair,
    table: Table,
    picked: str,
    where: Sequence[Condition | None],
    source: str,
    hard: Condition | None,
    **slots: Any,
) -> HardQuery | None:
    """``select picked from source where ...``; its rival lacks the condition ``hard``."""
    conditions = tuple(one for one in where if one is not None)
    if len(conditions) != len(where) or len({one.column for one in conditions}) != len(conditions):
        return None

    def select(of: Sequence[Condition]) -> str:
        return f"select {picked} from {source}" + (f" where {' and '.join(map(_sql, of))}" if of else "")

    rival = "" if hard is None else select([one for one in conditions if one is not hard])
    return HardQuery(form.partition("_")[0], form, pair, table, select(conditions), rival, slots, conditions)


def _having(
    form: str, pair: Pair, category: Column, value: str, bound: tuple[str, str], far: bool, **slots: Any
) -> HardQuery:
    source = pair.joined if far else pair.child.name
    grouped = f"select {category.name} from {source} group by {category.name}"
    sql = f"{grouped} having {value} {bound[0]} {bound[1]}"
    return HardQuery("having", form, pair, pair.child, sql, grouped, {"cat": category, **slots})


@cache
def _known(pair: Pair, column: Column) -> tuple[Any, ...]:
    return tuple(value for value in cells(pair, column) if value is not None)


def _measure(pair: Pair, rng: random.Random) -> tuple[Column, str]:
    number = rng.choice(pair.child.of_role("number"))
    return number, rng.choice([agg for agg in AGGREGATES if agg != "sum" or number.adds])


def _grouping(pair: Pair, table: Table, rng: random.Random, besides: Column | None = None) -> Column | None:
    fitting = [
        c
        for c in table.of_role("category", "level")
        if c is not besides and c is not pair.key and 2 <= len(set(_known(pair, c))) <= MOST_GROUPS
    ]
    return rng.choice(fitting) if fitting else None


@cache
def _groups(pair: Pair, category: Column) -> tuple[Any, ...]:
    """The group of each row of the child, through the join where the category is the parent's; None: in none."""
    if category in pair.child.columns:
        return cells(pair, category)
    of = dict(zip(cells(pair, pair.key), cells(pair, category), strict=True))
    return tuple(of.get(value) for value in cells(pair, pair.foreign))


def _bound(ranked: Sequence[float], rng: random.Random) -> tuple[str, str] | None:
    """A comparison that some of the ranked values pass and some do not."""
    places = [n for n in range(1, len(ranked)) if ranked[n - 1] < ranked[n]]
    if not places:
        return None
    place, op = rng.choice(places), rng.choice((">", ">", ">", "<", "<"))
    low, high = float(ranked[place - 1]), float(ranked[place])
    text = short_number(low + (high - low) * 1e-3, high - (high - low) * 1e-3)  # no group lies on the bound
    if high - low == 1 and low == int(low):  # whole numbers have nothing between them: the bound is one of them
        text = str(int(low)) if op == ">" else str(int(high))
    return op, text


def _gap(pair: Pair, rng: random.Random, present: float = 0.0) -> Condition | None:
    """``column is null``, or with a chance of ``present`` ``is not null``."""
    columns = [c for table in pair.tables for c in table.columns if nullable(pair, c)]
    if not columns:
        return None
    return Condition(rng.choice(columns), "is", "not null" if rng.random() < present else "null", "")


def _dated(pair: Pair, rng: random.Random) -> Column | None:
    dates = [column for table in pair.tables for column in table.of_role("date")]
    return rng.choice(dates) if dates else None


def _when(pair: Pair, date: Column, rng: random.Random) -> Condition | None:
    """A condition on a date: a range, a month or a year."""
    known = sorted(set(_known(pair, date)))
    draw = rng.random()
    if draw < 0.45:
        a, b = sorted(rng.sample(known, 2))
        if rng.random() < 0.6:  # not always far apart, so that some lists are short
            b = known[min(len(known) - 1, known.index(a) + rng.randint(1, 8))]
        return Condition(date, "between", f"'{a}' and '{b}'", f"{a}|{b}")
    chosen = rng.choice(known)
    if draw < 0.75 and len({day[:4] for day in known}) > 1:
        return Condition(date, "year", f"'{chosen[:4]}'", chosen[:4])
    return Condition(date, "month", f"'{chosen[5:7]}'", MONTH_NAMES[int(chosen[5:7]) - 1])


def _plain(pair: Pair, table: Table, rng: random.Random, besides: Column | None = None) -> Condition | None:
    """A comparison that part of the table passes, on another column than ``besides`` and the parent's key."""
    equal = [c for c in table.of_role("category", "level") if c is not besides and c is not pair.key]
    numbers = [c for c in table.of_role("number") if c is not besides]
    if equal and (not numbers or rng.random() < 0.6):
        column = rng.choice(equal)
        return equals(column, rng.choice(_known(pair, column)))
    if not numbers:
        return None
    column = rng.choice(numbers)
    op = rng.choices((">", "<", ">=", "<="), weights=(7, 7, 3, 3))[0]
    ranked = sorted(map(float, _known(pair, column)), reverse=op.startswith(">"))
    if len(ranked) < 3:
        return None
    place = rng.randint(1, max(1, len(ranked) - 1 - len(ranked) // 10))
    low, high = sorted((ranked[place - 1], ranked[place]))
    text = short_number(low, high)
    return Condition(column, op, text, text)
