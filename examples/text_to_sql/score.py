"""Scores predicted SQL by its rows: runs it read-only and bounded, and compares with the gold query's rows.

The SQL comes out of a model, so it is not trusted: only reads of the example's tables through a few harmless
functions are allowed, for a bounded number of steps and rows. Knows nothing of models or of making questions.
"""

from __future__ import annotations

import math
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from .tables import connect

__all__ = ["FUNCTIONS", "Database", "Outcome", "QueryError", "Score", "execute", "extract_sql", "same_rows", "score"]

Rows = list[tuple[Any, ...]]

MOST_STEPS = 3_000_000  # of sqlite's virtual machine, some 0.1 s; a gold query takes under 60,000
MOST_ROWS = 1_000
MOST_COLUMNS = 32
LONGEST_SQL = 2_000
LONGEST_TEXT = 4_000  # bytes that any one value may reach
#: what a query may call, and the most that one may need
FUNCTIONS = frozenset("avg sum total min max count round abs lower upper substr like".split())
_STEPS_A_CALL = 10_000


class QueryError(ValueError):
    """SQL that is not valid, not allowed, or too much work; the message says which."""


class Database:
    """Tables to be read by SQL that is not trusted, on one read-only connection, by one caller at a time.

    Args:
        connect: opens the database.
        functions: those that a query may call.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection], functions: frozenset[str] = FUNCTIONS) -> None:
        self.lock = threading.Lock()
        self.calls_left = 0
        self.functions = functions
        self.connection = connect()
        named = self.connection.execute("select name from sqlite_master where type = 'table'").fetchall()
        self.tables = frozenset(name for (name,) in named)
        self.connection.execute("pragma query_only = on")
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MOST_COLUMNS)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_TEXT)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        self.connection.set_authorizer(self._permit)
        self.connection.set_progress_handler(self._tick, _STEPS_A_CALL)

    def run(self, sql: str) -> Rows:
        """The rows of one SELECT.

        Raises:
            QueryError: it is not valid SQL, more than one statement, anything but a read, or too much work.
        """
        if not sql.strip():
            raise QueryError("running a query: it is empty; write one SELECT")
        if len(sql) > LONGEST_SQL:
            raise QueryError(f"running a query of {len(sql)} characters: the limit is {LONGEST_SQL}")
        try:
            rows = self._fetch(sql)
        except sqlite3.OperationalError as error:
            if str(error) == "interrupted":
                raise QueryError(f"running {sql!r}: stopped after {MOST_STEPS} steps; make it read less") from error
            raise QueryError(f"running {sql!r}: {error}") from error
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            raise QueryError(f"running {sql!r}: {error}") from error
        if len(rows) > MOST_ROWS:
            raise QueryError(f"running {sql!r}: it returns more than {MOST_ROWS} rows; make it return less")
        return rows

    def _fetch(self, sql: str) -> Rows:
        with self.lock:
            self.calls_left = MOST_STEPS // _STEPS_A_CALL
            cursor = self.connection.cursor()
            try:
                return cursor.execute(sql).fetchmany(MOST_ROWS + 1)
            finally:
                cursor.close()

    def _tick(self) -> int:
        self.calls_left -= 1
        return self.calls_left < 0  # not zero: sqlite interrupts the query

    def _permit(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """sqlite's question for each thing a statement would do; what is not listed here is denied."""
        if action == sqlite3.SQLITE_SELECT:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ and first in self.tables:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in self.functions:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY


@cache
def _easy() -> Database:
    return Database(connect)


def execute(sql: str) -> Rows:
    """The rows of one SELECT over the tables of :data:`text_to_sql.tables.TABLES`; see :meth:`Database.run`."""
    return _easy().run(sql)


_FENCE = re.compile(r"```[ \t]*(?:sql(?:ite)?\b)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def extract_sql(text: str) -> str:
    """The SQL in an answer: the first fenced block if there is one, without spaces and semicolons around."""
    fenced = _FENCE.search(text)
    return (fenced.group(1) if fenced else text).strip().rstrip("; \t\r\n").strip("` \t\r\n")


# -- comparing -----------------------------------------------------------------------------------------------


def same_rows(got: Rows, gold: Rows, ordered: bool) -> bool:
    """Whether two results are equal: the same rows as often, in the same order where ``ordered``.

    Columns are compared by place, not by name; numbers to a relative 1e-6, whole or not; a text is no number.
    """
    if len(got) != len(gold):
        return False
    if not ordered:
        got, gold = sorted(got, key=_sort_key), sorted(gold, key=_sort_key)
    return all(len(a) == len(b) and all(map(_same, a, b)) for a, b in zip(got, gold, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    return type(a) is type(b) and a == b


def _sort_key(row: tuple[Any, ...]) -> tuple[Any, ...]:
    # Texts first: two sums that differ in the last bit must not put rows of other texts in another order.
    texts = tuple("" if isinstance(v, int | float) or v is None else f"{type(v).__name__} {v}" for v in row)
    return texts, tuple(float(v) if isinstance(v, int | float) else -math.inf for v in row)


# -- scoring -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of one prediction. ``rows`` is what it returned; ``error`` why it returned nothing."""

    status: Literal["correct", "wrong", "invalid"]
    kind: str
    sql: str
    gold: str
    rows: Rows = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Score:
    """The outcomes of a split, in its order. Accuracies are shares from 0 to 1."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        return _share(self.outcomes)

    @property
    def by_kind(self) -> dict[str, float]:
        kinds = dict.fromkeys(o.kind for o in self.outcomes)
        return {kind: _share([o for o in self.outcomes if o.kind == kind]) for kind in kinds}

    @property
    def counts(self) -> dict[str, int]:
        """How many are ``correct``, ``wrong`` (other rows) and ``invalid`` (no rows: the SQL did not run)."""
        counts: dict[str, int] = {"correct": 0, "wrong": 0, "invalid": 0}
        for outcome in self.outcomes:
            counts[outcome.status] += 1
        return counts


def _share(outcomes: Sequence[Outcome]) -> float:
    return sum(o.status == "correct" for o in outcomes) / len(outcomes) if outcomes else 0.0


def score(predictions: Sequence[str], rows: Sequence[Mapping[str, Any]], run: Callable[[str], Rows] = execute) -> Score:
    """Scores answers against rows of :func:`text_to_sql.build`, one answer a row, by execution.

    Args:
        run: executes SQL over the rows' tables.

    Raises:
        ValueError: the numbers of predictions and rows differ.
        QueryError: a gold query does not run.
    """
    if len(predictions) != len(rows):
        raise ValueError(f"scoring {len(predictions)} predictions against {len(rows)} rows: give one for each")
    return Score(tuple(_judge(p, row, run) for p, row in zip(predictions, rows, strict=True)))


def _judge(prediction: str, row: Mapping[str, Any], run: Callable[[str], Rows]) -> Outcome:
    sql, gold, kind = extract_sql(prediction), row["sql"], row["kind"]
    expected = run(gold)
    try:
        got = run(sql)
    except QueryError as error:
        return Outcome("invalid", kind, sql, gold, error=str(error))
    status = "correct" if same_rows(got, expected, ordered=kind == "top") else "wrong"
    return Outcome(status, kind, sql, gold, got)
