"""The real tables behind the questions: the data files of ``vega_datasets``, cleaned, in one sqlite database.

Says what each column is (a label, a category, a measured number, ...) and which whole tables are held out.
Knows nothing of questions, SQL wordings or models.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

__all__ = ["HELD_OUT_TABLES", "TABLES", "TRAIN_TABLES", "Column", "Table", "connect", "schema", "values"]

Role = Literal["label", "date", "category", "level", "number"]
Value = str | int | float | None
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its snake_case name in the database.
        type: ``text``, ``integer`` or ``real``.
        role: ``label`` and ``date`` name a row and can be listed; a ``category`` is a text with few values;
            a ``level`` is an integer with few values (a year, cylinders); a ``number`` is measured.
        take: the value, from a record of the file.
        plural: how a question names several of its values.
        says: how a question may name the column.
        adds: whether the sum of the column means anything (that of latitudes does not).
    """

    name: str
    type: Literal["text", "integer", "real"]
    role: Role
    take: Callable[[Record], Value]
    plural: str
    says: tuple[str, ...]
    adds: bool = False


@dataclass(frozen=True)
class Table:
    """One table: its file in ``vega_datasets/_data``, the noun for its rows and its columns.

    ``every`` keeps each n-th record of a long file. Records with a missing value are left out, so that no
    question hinges on how SQL treats NULL.
    """

    name: str
    files: tuple[str, ...]
    rows: str
    columns: tuple[Column, ...]
    held_out: bool = False
    every: int = 1

    def of_role(self, *roles: Role) -> tuple[Column, ...]:
        """The columns with one of these roles, in schema order."""
        return tuple(c for c in self.columns if c.role in roles)

    @property
    def listed(self) -> tuple[Column, ...]:
        """The columns that name a row; where a table has none, its categories and levels stand in."""
        return self.of_role("label", "date") or self.of_role("category", "level")

    def column(self, name: str) -> Column:
        """The column with this name. Raises KeyError when there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"table {self.name} has no column {name!r}")


def schema(table: Table, columns: Iterable[Column] | None = None) -> str:
    """``cars(name text, horsepower integer, ...)``, with the given columns in the given order, or all."""
    named = table.columns if columns is None else columns
    return f"{table.name}({', '.join(f'{c.name} {c.type}' for c in named)})"


def words_of(name: str) -> str:
    """A name as it is said."""
    return name.replace("_", " ")


def plural_of(words: str) -> str:
    """The plural of words as they are said."""
    if words.endswith("s"):
        return words
    return words[:-1] + "ies" if words.endswith("y") else words + "s"


def _text(role: Role, name: str, source: str | None = None, plural: str | None = None, *says: str) -> Column:
    key = source or name
    words = words_of(name)
    return Column(
        name, "text", role, lambda r: str(r[key]).strip() or None, plural or plural_of(words), says or (words,)
    )


def _label(name: str, source: str | None = None, plural: str | None = None) -> Column:
    return _text("label", name, source, plural)


def _category(name: str, source: str | None = None, *says: str) -> Column:
    return _text("category", name, source, None, *says)


def _number(name: str, source: str | None = None, *says: str, whole: bool = False, adds: bool = True) -> Column:
    key, words = source or name, words_of(name)
    cast = int if whole else float

    def take(record: Record) -> Value:
        value = record.get(key)
        return None if value in (None, "") else cast(value)  # type: ignore[arg-type]

    return Column(name, "integer" if whole else "real", "number", take, plural_of(words), says or (words,), adds)


def day_of(text: str) -> date:
    """The day that one of the files' ways to write it means."""
    for pattern in ("%Y-%m-%d", "%Y/%m/%d", "%b %d %Y", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S"):
        try:
            return datetime.strptime(text, pattern).date()
        except ValueError:
            continue
    raise ValueError(f"reading a date: {text!r} has none of the known forms")


def _date(name: str = "date", source: str = "date") -> Column:
    return Column(name, "text", "date", lambda r: day_of(r[source]).isoformat(), plural_of(name), (words_of(name),))


def _level(name: str, take: Callable[[Record], int], role: Role = "level") -> Column:
    return Column(name, "integer", role, take, plural_of(words_of(name)), (words_of(name),))


def _year(source: str = "date", role: Role = "level") -> Column:
    return _level("year", lambda r: int(str(r[source])[:4]), role)


TABLES: tuple[Table, ...] = (
    Table("cars", ("cars.json",), "cars", (
        _label("name", "Name"), _number("miles_per_gallon", "Miles_per_Gallon"),
        _level("cylinders", lambda r: int(r["Cylinders"])), _number("displacement", "Displacement"),
        _number("horsepower", "Horsepower", whole=True),
        _number("weight", "Weight_in_lbs", whole=True), _year("Year"), _category("origin", "Origin"),
    )),
    Table("airports", ("airports.csv",), "airports", (
        _label("iata", plural="iata codes"), _label("name"), _label("city"), _category("state"),
        _number("latitude", adds=False), _number("longitude", adds=False),
    ), every=3),
    Table("weather", ("seattle-weather.csv",), "days", (
        _date(), _level("month", lambda r: day_of(r["date"]).month), _number("precipitation"),
        _number("temp_max", adds=False), _number("temp_min", adds=False), _number("wind"),
        _category("weather"),
    )),
    Table("temperatures", ("seattle-temps.csv", "sf-temps.csv"), "readings", (
        _category("city", "file city"), _date(), _level("month", lambda r: day_of(r["date"]).month),
        _level("hour", lambda r: int(r["date"].split()[1][:2])), _number("temperature", "temp", adds=False),
    ), every=5),
    Table("stocks", ("stocks.csv",), "quotes", (
        _category("symbol"), _date(), _level("year", lambda r: day_of(r["date"]).year), _number("price"),
    )),
    Table("trading", ("ohlc.json",), "trading days", (
        _date(), _number("open", None, "open", "open price"), _number("high", None, "high", "high price"),
        _number("low", None, "low", "low price"), _number("close", None, "close", "close price"),
        _category("signal"), _number("gain", "ret"),
    )),
    Table("driving", ("driving.json",), "records", (
        _year("year", "label"), _number("miles", whole=True), _number("gas", None, "gas", "gas price"),
    )),
    Table("electricity", ("iowa-electricity.csv",), "records", (
        _year("year"), _category("source"), _number("net_generation", whole=True),
    )),
    # The people in this file have names and races there: neither is a thing to practise SQL on.
    Table("riot_deaths", ("la-riots.csv",), "victims", (
        _date("death_date", "death_date"), _number("age", whole=True), _category("gender"),
        _label("address", plural="addresses"), _category("neighborhood"), _category("manner", "type"),
        _number("latitude", adds=False),
    )),
    Table("goods_jobs", ("us-employment.csv",), "reports", (
        _label("month"), _year("month"), _number("mining_and_logging", whole=True),
        _number("construction", whole=True), _number("manufacturing", whole=True),
        _number("durable_goods", whole=True), _number("nondurable_goods", whole=True),
    )),
    Table("service_jobs", ("us-employment.csv",), "reports", (
        _label("month"), _year("month"), _number("wholesale_trade"), _number("retail_trade"),
        _number("utilities"), _number("information", whole=True), _number("government", whole=True),
    )),
    Table("anscombe", ("anscombe.json",), "points", (
        _category("series", "Series"), _number("x", "X"), _number("y", "Y"),
    )),
    Table("antibiotics", ("burtin.json",), "entries", (
        _label("bacteria", "Bacteria", "bacteria"), _number("penicillin", "Penicillin"),
        _number("streptomycin", "Streptomycin"), _number("neomycin", "Neomycin"),
        _category("gram_staining", "Gram_Staining"), _category("genus", "Genus"),
    ), held_out=True),
    # The file has no key: ``specimen`` numbers its rows, so that a question can ask for some of them.
    Table("iris", ("iris.json",), "flowers", (
        _level("specimen", lambda r: int(r["row"]), "label"), _number("sepal_length", "sepalLength"),
        _number("sepal_width", "sepalWidth"), _number("petal_length", "petalLength"),
        _number("petal_width", "petalWidth"), _category("species"),
    ), held_out=True),
    Table("crimea", ("crimea.json",), "reports", (
        _date(), _year(), _number("wounds", whole=True), _number("disease", whole=True),
        _number("other_causes", "other", whole=True),
    ), held_out=True),
    Table("barley", ("barley.json",), "harvests", (
        _category("variety"), _category("site"), _year("year"), _number("yield"),
    ), held_out=True),
    Table("grain", ("wheat.json",), "records", (
        _year("year", "label"), _number("wheat_price", "wheat"), _number("wages"),
    ), held_out=True),
)  # fmt: skip

TRAIN_TABLES: tuple[Table, ...] = tuple(t for t in TABLES if not t.held_out)
HELD_OUT_TABLES: tuple[Table, ...] = tuple(t for t in TABLES if t.held_out)

_CITIES = {"seattle-temps.csv": "Seattle", "sf-temps.csv": "San Francisco"}


def data_folder() -> Path:
    """The package's data folder; the package itself is not imported (it would bring pandas)."""
    spec = importlib.util.find_spec("vega_datasets")
    if spec is None or spec.origin is None:
        from deltaw.errors import (
            MissingExtra,
        )  # only to fail: it may import more than a reader of files needs

        raise MissingExtra("vega_datasets", "examples", "reading the tables of the text-to-SQL example")
    return Path(spec.origin).parent / "_data"


def records_of(folder: Path, file: str) -> list[dict[str, Any]]:
    with (folder / file).open(encoding="utf-8", newline="") as stream:
        records = json.load(stream) if file.endswith(".json") else list(csv.DictReader(stream))
    return [{**r, "row": n, "file city": _CITIES.get(file, "")} for n, r in enumerate(records, start=1)]


def connect() -> sqlite3.Connection:
    """A fresh in-memory database with every table of :data:`TABLES`, about 9,000 rows in all.

    Raises:
        MissingExtra: ``vega_datasets`` is not installed.
    """
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    for table in TABLES:
        rows = _rows(table)
        connection.execute(f"create table {schema(table)}")
        marks = ", ".join("?" * len(table.columns))
        connection.execute("begin")
        connection.executemany(f"insert into {table.name} values ({marks})", rows)
        connection.execute("commit")
    return connection


@cache
def _rows(table: Table) -> tuple[tuple[Value, ...], ...]:
    folder = data_folder()
    records = [r for file in table.files for r in records_of(folder, file)[:: table.every]]
    rows = (tuple(c.take(r) for c in table.columns) for r in records)
    return tuple(row for row in rows if None not in row)


@cache
def values(table: Table, column: Column) -> tuple[Value, ...]:
    """Every value of a column, in row order."""
    place = table.columns.index(column)
    return tuple(row[place] for row in _rows(table))
