"""The same query over a table with other names: so that names are copied from the schema, not learned by heart.

Twelve tables have some eighty column names, which a model soon knows by heart; on an unseen table it then writes a name
it knows. A renamed training row keeps its query's shape, and takes table, columns and quoted text from a vocabulary of
thousands of names, none of which occurs in a held-out table. Knows nothing of wordings.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from .questions import Condition, Query
from .tables import HELD_OUT_TABLES, Column, Table, plural_of, values, words_of

__all__ = ["TEXTS", "THINGS", "new_name", "pick", "renamed"]

THINGS = """
orders patients books films songs players teams matches flights trains ships trucks hotels rooms guests
students teachers courses lessons exams schools clubs members tickets events museums paintings statues coins
stamps recipes meals wines cheeses loaves gardens trees shrubs birds fishes insects horses dogs lakes rivers
peaks caves islands villages streets houses bridges towers mines wells factories machines engines batteries
lamps sensors probes satellites planets comets samples tablets vials letters parcels invoices payments loans
accounts policies claims tenders ballots petitions verdicts articles journals podcasts photos maps sketches
shirts boots hats rings clocks violins drums
""".split()

_MEASURES = """
weight height width depth length area volume mass density pressure humidity altitude distance speed velocity
torque power voltage current charge energy heat brightness loudness pitch rating score rank price cost fee
fare rent wage salary income profit revenue budget debt tax discount stock supply demand output waste usage
load traffic visits votes points goals assists errors delays pauses turns laps grams calories protein sugar
sodium iron zinc copper nickel cobalt tungsten quartz lysine caffeine chlorine ammonia glucose insulin ozone
radon krypton ethanol acetone benzene toluene morphine aspirin ibuprofen tannin gluten starch salinity
turbidity acidity viscosity porosity hardness elasticity frequency amplitude latency bandwidth throughput
capacity mileage tonnage acreage population turnout attendance enrolment births deaths marriages arrivals
departures duration tenure thickness radius circumference slope wingspan girth
""".split()

_QUALITIES = """
net gross peak basic dry wet raw final initial annual daily weekly upper lower inner outer left right
primary secondary spare extra base target actual planned local foreign public private urban rural early late
warm cold north south lead tail
""".split()

_GROUPS = """
colour brand model grade class region district county province city country continent language currency
department faculty branch sector industry category type style genre material fabric flavour shape size
season weekday shift status priority channel platform vendor supplier carrier owner sponsor coach pilot
judge editor curator habitat climate terrain blood_group diet breed phase stage level tier league division
round quarter decade
""".split()

_LABELS = """
name title code label serial ticket reference handle nickname headline surname address plate badge barcode
docket folio shelf slot callsign hostname filename isbn passport licence
""".split()

TEXTS = """
Amber Basil Cedar Delta Ember Falcon Granite Harbor Indigo Juniper Kestrel Lagoon Maple Nimbus Onyx Pewter
Quill Raven Sable Topaz Umber Velvet Willow Xenon Yarrow Zephyr Lisbon Oslo Nairobi Quito Hanoi Tunis Riga
Perth Lima Accra morning evening monthly wooden plastic ceramic striped hybrid manual remote expired pending
approved Monday Thursday January August Silver Crimson Alpha-7 Beta-2 Type-B Grade-A West-End Upper-Lake
Saint-Mary
""".split()


@cache
def _reserved() -> frozenset[str]:
    """Every word of the held-out tables: their names, columns, row nouns and texts."""
    words: set[str] = set()
    for table in HELD_OUT_TABLES:
        words |= {table.name, *table.rows.split()}
        for column in table.columns:
            words |= {column.name, *column.name.split("_"), *column.plural.split()}
            words |= {str(value) for value in values(table, column) if isinstance(value, str)}
    return frozenset(word.lower() for word in words)


@cache
def _allowed(pool: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in pool if word.lower() not in _reserved())


def pick(pool: Sequence[str], rng: random.Random) -> str:
    """A word of ``pool`` that no held-out table knows."""
    return rng.choice(_allowed(tuple(pool)))


def new_name(column: Column, rng: random.Random) -> str:
    """Another name for a column of this role."""
    if column.role in ("label", "date"):
        return pick(_LABELS, rng)
    word = pick(_GROUPS if column.role in ("category", "level") else _MEASURES, rng)
    return f"{pick(_QUALITIES, rng)}_{word}" if rng.random() < 0.35 else word


def renamed(query: Query, rng: random.Random) -> Query:
    """``query`` over a table that differs in nothing but its names and the text it quotes."""
    thing = pick(THINGS, rng)
    taken: set[str] = {thing}
    columns: dict[str, Column] = {}
    for column in query.table.columns:
        name = new_name(column, rng)
        while name in taken:
            name = new_name(column, rng)
        taken.add(name)
        words = words_of(name)
        columns[column.name] = replace(column, name=name, plural=plural_of(words), says=(words,))
    table: Table = replace(query.table, name=thing, rows=thing, columns=tuple(columns.values()))

    def of(column: Column | None) -> Column | None:
        return None if column is None else columns[column.name]

    where = query.where
    if where is not None:
        column, op, value = columns[where.column.name], where.op, where.says
        if where.sql.startswith("'"):
            value = pick(TEXTS, rng)
        elif op != "=":  # no row has to pass it, so the rarer comparisons can come more often here
            op = rng.choice((">", "<", ">=", ">=", "<=", "<="))
        where = Condition(column, op, f"'{value}'" if where.sql.startswith("'") else value, value)
    names = {old: new.name for old, new in columns.items()} | {query.table.name: thing}
    head = query.sql.removesuffix(f" where {query.where}")
    sql = re.sub(r"[a-z_]\w*", lambda m: names.get(m[0], m[0]), head)
    if where is not None:
        sql += f" where {where}"
    return replace(
        query,
        table=table,
        sql=sql,
        number=of(query.number),
        category=of(query.category),
        label=of(query.label),
        where=where,
    )
