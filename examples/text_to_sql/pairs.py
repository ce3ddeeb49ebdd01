"""The table pairs of the hard set: real tables of ``vega_datasets`` beside a second one that they refer to.

Unlike in `tables`, a missing value stays NULL: some files leave values out, and a ``change`` has none in the first
record of its series. All column names of a pair differ, so that only the join itself needs the tables' names. Knows
nothing of questions, SQL wordings or models.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

from . import facts
from .tables import Column, Role, Table, Value, data_folder, day_of, plural_of, records_of, schema, words_of

__all__ = ["HELD_OUT_PAIRS", "PAIRS", "TRAIN_PAIRS", "Pair", "all_columns", "cells", "connect_pairs", "nullable"]

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two tables, the first of which refers to the second.

    Attributes:
        child: the table from the file.
        parent: the one that it refers to.
        foreign, key: the columns that join them, the child's and the parent's.
        noun: one row of the parent, as a question calls it.
        read: the records of both.
        held_out: kept for the tests ``table`` and ``both``.
    """

    child: Table
    parent: Table
    foreign: Column
    key: Column
    noun: str
    read: Callable[[], tuple[list[Record], list[Record]]]
    held_out: bool = False

    @property
    def name(self) -> str:
        """Of both tables."""
        return f"{self.child.name}+{self.parent.name}"

    @property
    def tables(self) -> tuple[Table, Table]:
        return self.child, self.parent

    @property
    def joined(self) -> str:
        """What follows ``from`` in a query over both."""
        child, parent = self.child.name, self.parent.name
        return f"{child} join {parent} on {child}.{self.foreign.name} = {parent}.{self.key.name}"

    def table_of(self, column: Column) -> Table:
        """The one of the two that has ``column``."""
        return self.child if column in self.child.columns else self.parent


@cache
def cells(pair: Pair, column: Column) -> tuple[Value, ...]:
    """Every value of a column, in row order; None for NULL."""
    table = pair.table_of(column)
    place = table.columns.index(column)
    return tuple(row[place] for row in _rows(pair)[table is pair.parent])


@cache
def nullable(pair: Pair, column: Column) -> bool:
    """Whether some rows have no value there, and others have one."""
    found = [value is None for value in cells(pair, column)]
    return any(found) and not all(found)


def connect_pairs() -> sqlite3.Connection:
    """A fresh in-memory database with the tables of all :data:`PAIRS`.

    Raises:
        MissingExtra: ``vega_datasets`` is not installed.
    """
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    for pair in PAIRS:
        for table, rows in zip(pair.tables, _rows(pair), strict=True):
            connection.execute(f"create table {schema(table)}")
            connection.execute("begin")
            connection.executemany(f"insert into {table.name} values ({', '.join('?' * len(table.columns))})", rows)
            connection.execute("commit")
    return connection


@cache
def _rows(pair: Pair) -> tuple[tuple[tuple[Value, ...], ...], tuple[tuple[Value, ...], ...]]:
    child, parent = (
        tuple(tuple(column.take(record) for column in table.columns) for record in records)
        for table, records in zip(pair.tables, pair.read(), strict=True)
    )
    return child, parent


# -- columns ---------------------------------------------------------------------------------------------------


def _column(name: str, role: Role, kind: str = "text", plural: str = "", says: str = "", adds: bool = False) -> Column:
    words = says or words_of(name)
    return Column(name, kind, role, itemgetter(name), plural or plural_of(words), (words,), adds)  # type: ignore[arg-type]


def _label(name: str, plural: str = "", says: str = "") -> Column:
    return _column(name, "label", plural=plural, says=says)


def _category(name: str, plural: str = "", says: str = "") -> Column:
    return _column(name, "category", plural=plural, says=says)


def _date(name: str, says: str = "") -> Column:
    return _column(name, "date", plural=f"{says or words_of(name)}s", says=says)


def _level(name: str, says: str = "") -> Column:
    return _column(name, "level", "integer", says=says)


def _number(name: str, says: str = "", whole: bool = False, adds: bool = True) -> Column:
    return _column(name, "number", "integer" if whole else "real", says=says, adds=adds)


def _table(name: str, rows: str, *columns: Column) -> Table:
    return Table(name, (), rows, columns)


def _pair(child: Table, parent: Table, foreign: str, key: str, noun: str, read: Any, held_out: bool = False) -> Pair:
    return Pair(child, parent, child.column(foreign), parent.column(key), noun, read, held_out)


# -- records ---------------------------------------------------------------------------------------------------


def _file(name: str) -> list[Record]:
    return records_of(data_folder(), name)


def _changes(records: Sequence[Record], value: str, series: str = "", name: str = "change") -> list[Record]:
    """The records, each with its change from the one before in its series: None in the first."""
    last: dict[Any, Any] = {}
    made = []
    for record in records:
        before, now = last.get(record.get(series)), record[value]
        made.append({**record, name: None if before is None else round(now - before, 2)})
        last[record.get(series)] = now
    return made


def _cars() -> tuple[list[Record], list[Record]]:
    def made(record: Record) -> Record:
        first, *rest = record["Name"].split()
        return {
            "maker": facts.MAKER_SPELLINGS.get(first, first),
            "model": " ".join(rest) or first,
            "mpg": record["Miles_per_Gallon"],
            "horsepower": record["Horsepower"],
            "weight": record["Weight_in_lbs"],
            "cylinders": record["Cylinders"],
            "model_year": int(record["Year"][:4]),
        }

    return [made(record) for record in _file("cars.json")], facts.MAKERS


def _airports() -> tuple[list[Record], list[Record]]:
    known = {state["code"] for state in facts.STATES}
    third = [
        r for n, r in enumerate(_file("airports.csv")) if r["state"] == "NA" or (n % 3 == 0 and r["state"] in known)
    ]
    airports = [
        {
            **{key: None if r[key] == "NA" else r[key] for key in ("iata", "name", "city", "state")},
            **{key: round(float(r[key]), 4) for key in ("latitude", "longitude")},
        }
        for r in third
    ]
    return airports, facts.STATES


def _quotes() -> tuple[list[Record], list[Record]]:
    records = [
        {"symbol": r["symbol"], "day": day_of(r["date"]).isoformat(), "price": float(r["price"])}
        for r in _file("stocks.csv")
    ]
    return _changes(records, "price", "symbol"), facts.COMPANIES


def _weather() -> tuple[list[Record], list[Record]]:
    days = [
        {
            "date": day_of(r["date"]).isoformat(),
            "month": day_of(r["date"]).month,
            "sky": r["weather"],
            **{key: float(r[key]) for key in ("precipitation", "temp_max", "temp_min", "wind")},
        }
        for r in _file("seattle-weather.csv")
    ]
    return days, facts.MONTHS


def _jobs() -> tuple[list[Record], list[Record]]:
    records = [
        {"sector": one["industry"], "reported": r["month"], "jobs": float(r[one["industry"].replace(" ", "_")])}
        for one in facts.SECTORS
        for r in _file("us-employment.csv")
    ]
    return _changes(records, "jobs", "sector"), facts.SECTORS


def _driving() -> tuple[list[Record], list[Record]]:
    records = [
        {**r, "gas_price": r["gas"], "president": facts.in_office(facts.PRESIDENTS, "surname", r["year"])}
        for r in sorted(_file("driving.json"), key=itemgetter("year"))
    ]
    return _changes(records, "miles"), facts.PRESIDENTS


def _electricity() -> tuple[list[Record], list[Record]]:
    records = [
        {"source": r["source"], "recorded": r["year"], "generation": int(r["net_generation"])}
        for r in _file("iowa-electricity.csv")
    ]
    return _changes(records, "generation", "source"), facts.SOURCES


def _barley() -> tuple[list[Record], list[Record]]:
    records = [{**r, "yield": round(r["yield"], 2)} for r in _file("barley.json")]
    first = {(r["variety"], r["site"]): r["yield"] for r in records if r["year"] == 1931}
    gains = [
        {**r, "gain": round(r["yield"] - first[r["variety"], r["site"]], 2) if r["year"] == 1932 else None}
        for r in records
    ]
    return gains, facts.SITES


def _antibiotics() -> tuple[list[Record], list[Record]]:
    names = ("Bacteria", "Genus", "Penicillin", "Streptomycin", "Neomycin", "Gram_Staining")
    return [{name.lower(): r[name] for name in names} for r in _file("burtin.json")], facts.GENERA


def _grain() -> tuple[list[Record], list[Record]]:
    records = [
        {
            "year": int(r["year"]),
            "wheat_price": float(r["wheat"]),
            "wages": None if r.get("wages") is None else float(r["wages"]),
            "monarch": facts.in_office(facts.MONARCHS, "sovereign", int(r["year"])),
        }
        for r in _file("wheat.json")
    ]
    return _changes(records, "wheat_price", name="rise"), [one for one in facts.MONARCHS if one["sovereign"]]


def _crimea() -> tuple[list[Record], list[Record]]:
    records = [
        {**r, "other_causes": r["other"], "commander": facts.in_office(facts.COMMANDERS, "general", r["date"][:7])}
        for r in _file("crimea.json")
    ]
    return _changes(records, "disease", name="increase"), facts.COMMANDERS


def _iris() -> tuple[list[Record], list[Record]]:
    names = {
        "sepal_length": "sepalLength",
        "sepal_width": "sepalWidth",
        "petal_length": "petalLength",
        "petal_width": "petalWidth",
    }
    flowers = [
        {"specimen": r["row"], "species": r["species"], **{name: r[key] for name, key in names.items()}}
        for r in _file("iris.json")
    ]
    return flowers, facts.SPECIES


PAIRS: tuple[Pair, ...] = (
    _pair(
        _table("cars", "cars", _category("maker"), _label("model"), _number("mpg", "miles per gallon", adds=False),
               _number("horsepower", whole=True), _number("weight", whole=True), _level("cylinders"),
               _level("model_year")),
        _table("makers", "makers", _label("brand"), _category("country"), _category("owner"),
               _number("founded", "founding year", whole=True, adds=False)),
        "maker", "brand", "maker", _cars),
    _pair(
        _table("airports", "airports", _label("iata", "iata codes", "iata code"), _label("name"), _category("city"),
               _category("state"), _number("latitude", adds=False), _number("longitude", adds=False)),
        _table("states", "states", _label("code"), _category("region"), _category("coast", says="ocean coast")),
        "state", "code", "state", _airports),
    _pair(
        _table("quotes", "quotes", _category("symbol"), _date("day"), _number("price"), _number("change")),
        _table("companies", "companies", _label("ticker"), _label("company"), _category("industry"),
               _category("headquarters", "headquarters"), _number("founded", "founding year", whole=True, adds=False)),
        "symbol", "ticker", "company", _quotes),
    _pair(
        _table("weather", "days", _date("date"), _level("month"), _number("precipitation"),
               _number("temp_max", adds=False), _number("temp_min", adds=False), _number("wind"), _category("sky")),
        _table("calendar", "months", _level("number"), _category("season"),
               _number("length", whole=True)),
        "month", "number", "month", _weather),
    _pair(
        _table("employment", "reports", _category("sector"), _date("reported", "reporting date"),
               _number("jobs", adds=False), _number("change")),
        _table("sectors", "sectors", _label("industry"), _category("part", says="part of the economy"),
               _category("employer")),
        "sector", "industry", "sector", _jobs),
    _pair(
        _table("driving", "records", _column("year", "label", "integer"), _number("miles", whole=True),
               _number("gas_price", adds=False), _number("change", whole=True), _category("president")),
        _table("presidents", "presidents", _label("surname"), _category("party"), _category("home_state"),
               _number("since", "first year", whole=True, adds=False)),
        "president", "surname", "president", _driving),
    _pair(
        _table("electricity", "records", _category("source"), _date("recorded", "recording date"),
               _number("generation", whole=True), _number("change", whole=True)),
        _table("sources", "sources", _label("fuel"), _category("carbon_free", says="carbon-free status"),
               _category("renewable", says="renewable status")),
        "source", "fuel", "source", _electricity),
    _pair(
        _table("harvests", "harvests", _category("variety"), _category("site"), _level("year"),
               _number("yield"), _number("gain")),
        _table("sites", "sites", _label("town"), _category("part_of_state", says="part of the state"),
               _number("degrees_north", adds=False)),
        "site", "town", "site", _barley, held_out=True),
    _pair(
        _table("antibiotics", "entries", _label("bacteria", "bacteria"), _category("genus", "genera"),
               _number("penicillin"), _number("streptomycin"), _number("neomycin"), _category("gram_staining")),
        _table("genera", "genera", _label("family"), _category("shape")),
        "genus", "family", "genus", _antibiotics, held_out=True),
    _pair(
        _table("grain", "records", _column("year", "label", "integer"), _number("wheat_price", adds=False),
               _number("wages", adds=False), _number("rise"), _category("monarch")),
        _table("monarchs", "monarchs", _label("sovereign"), _category("house"), _date("crowned", "accession date"),
               _category("sex", "sexes")),
        "monarch", "sovereign", "monarch", _grain, held_out=True),
    _pair(
        _table("crimea", "reports", _date("date"), _number("wounds", whole=True), _number("disease", whole=True),
               _number("other_causes", whole=True), _number("increase", whole=True), _category("commander")),
        _table("commanders", "commanders", _label("general"),
               _number("birth_year", whole=True, adds=False), _category("title")),
        "commander", "general", "commander", _crimea, held_out=True),
    _pair(
        _table("iris", "flowers", _column("specimen", "label", "integer"), _category("species", "species"),
               _number("sepal_length"), _number("sepal_width"), _number("petal_length"), _number("petal_width")),
        _table("kinds", "kinds", _label("latin", "Latin names", "Latin name"), _category("common_name"),
               _number("chromosomes", whole=True, adds=False)),
        "species", "latin", "species", _iris, held_out=True),
)  # fmt: skip

TRAIN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in PAIRS if not pair.held_out)
HELD_OUT_PAIRS: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair.held_out)


def all_columns(pairs: Iterable[Pair]) -> set[str]:
    """The column names of these pairs."""
    return {column.name for pair in pairs for table in pair.tables for column in table.columns}
