"""Builds the splits of the hard set, by the rules of `build`: balanced, and no gold SQL of a test split in train.

                        training wordings   held-out wordings
    training pairs      seen                wording
    held-out pairs      table               both

The test splits are the same for every seed. Knows nothing of models or of who answers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

from .build import DROP_COLUMN, INSTRUCTION, RENAMED, TEST_SPLITS
from .hard_ask import ask_hard
from .hard_questions import FORMS, HARD_KINDS, HardQuery, fit, sample_hard
from .hard_wordings import HARD_HELD_OUT, HARD_TRAIN, HardWordings
from .pairs import HELD_OUT_PAIRS, TRAIN_PAIRS, Pair, all_columns, connect_pairs
from .questions import Condition
from .rename import _TEXTS, _THINGS, _name, _pick
from .score import FUNCTIONS, Database, QueryError, Rows
from .tables import Column, Table, schema

__all__ = ["build_hard", "hard_database", "hard_prompt"]

Row = dict[str, Any]
GOLD = 300  # queries a test set
TRIES = 60
MOST_STALE = 4000  # training questions in a row that were all asked before


@cache
def hard_database() -> Database:
    """The tables of all pairs, to be read with a few functions more than the easy set needs."""
    return Database(connect_pairs, FUNCTIONS | {"coalesce", "ifnull", "strftime"})


def hard_prompt(pair: Pair, question: str, columns: Sequence[Sequence[Column]] | None = None) -> list[dict[str, str]]:
    """The messages before the answer: the instruction with both schemas, and the question.

    Args:
        columns: those that the child's and the parent's schema show; None: all.
    """
    shown = [table.columns for table in pair.tables] if columns is None else columns
    schemas = ", ".join(schema(table, some) for table, some in zip(pair.tables, shown, strict=True))
    return [
        {"role": "system", "content": f"{INSTRUCTION} Tables {schemas}"},
        {"role": "user", "content": question},
    ]


def build_hard(seed: int = 0, train: int = 2000, test: int = GOLD) -> dict[str, list[Row]]:
    """The splits ``train``, ``seen``, ``wording``, ``table`` and ``both`` of the hard set.

    A row holds ``prompt`` and ``completion`` (lists of messages), ``table`` (the pair's name), ``kind``, ``form``,
    ``sql``, ``wording``.

    Args:
        seed: draws the training rows; the test splits do not depend on it.
        train: number of training rows.
        test: questions in each test split, at most 300; fewer are the first of the 300, as balanced.

    Raises:
        ValueError: ``train`` or ``test`` is out of range.
        MissingExtra: ``vega_datasets`` is not installed.
    """
    if train < 0 or not 0 <= test <= GOLD:
        raise ValueError(f"building train={train}, test={test}: train is 0 or more, test from 0 to {GOLD}")
    splits = {"train": _train(seed, train)}
    for split in TEST_SPLITS:
        splits[split] = _test(split)[:test]
    return splits


def _forms() -> list[str]:
    """The forms so that kinds take turns, and within a kind its forms."""
    turns = {kind: cycle(FORMS[kind]) for kind in HARD_KINDS}
    return [next(turns[kind]) for _ in range(GOLD) for kind in HARD_KINDS][:GOLD]


@cache
def _gold(pairs: tuple[Pair, ...]) -> tuple[HardQuery, ...]:
    """The gold queries of the two test splits over these pairs: no two alike."""
    draw = _Draw(random.Random(f"hard {' '.join(pair.name for pair in pairs)}"), pairs)
    return tuple(draw.query(form) for form in _forms())


def _test(split: str) -> list[Row]:
    pairs = TRAIN_PAIRS if split in ("seen", "wording") else HELD_OUT_PAIRS
    words = HARD_TRAIN if split in ("seen", "table") else HARD_HELD_OUT
    rng = random.Random(f"hard words {split}")
    return [_row(query, words, rng) for query in _gold(pairs)]


def _train(seed: int, size: int) -> list[Row]:
    rng = random.Random(f"hard train {seed}")
    banned = {query.sql for pairs in (TRAIN_PAIRS, HELD_OUT_PAIRS) for query in _gold(pairs)} if size else set()
    draw = _Draw(rng, TRAIN_PAIRS, banned)
    rows: list[Row] = []
    asked: set[tuple[str, str]] = set()
    stale = 0
    for form in cycle(_forms()):
        if len(rows) >= size:
            break
        query = draw.query(form, again=True)
        row = _row(renamed_pair(query, rng) if rng.random() < RENAMED else query, HARD_TRAIN, rng, vary=True)
        key = (row["sql"], row["prompt"][-1]["content"])
        if key not in asked:
            asked.add(key)
            rows.append(row)
            stale = 0
        elif (stale := stale + 1) > MOST_STALE:
            raise ValueError(f"building train={size}: only {len(rows)} questions found; ask for fewer")
    rng.shuffle(rows)
    return rows


def _row(query: HardQuery, words: HardWordings, rng: random.Random, vary: bool = False) -> Row:
    question, frame = ask_hard(query, words, rng)
    shown = [list(table.columns) for table in query.pair.tables]
    if vary:
        needed = {*query.columns, query.pair.foreign, query.pair.key}
        shown = [[c for c in some if c in needed or rng.random() >= DROP_COLUMN] for some in shown]
        for some in shown:
            rng.shuffle(some)
    return {
        "prompt": hard_prompt(query.pair, question, shown),
        "completion": [{"role": "assistant", "content": query.sql}],
        "table": query.pair.name,
        "kind": query.kind,
        "form": query.form,
        "sql": query.sql,
        "wording": frame,
    }


class _Draw:
    """Draws fit queries, none twice, from the pair least used for the form."""

    def __init__(self, rng: random.Random, pairs: Sequence[Pair], banned: set[str] | None = None) -> None:
        self.rng = rng
        self.pairs = pairs
        self.banned = banned or set()
        self.used: Counter[tuple[str, str]] = Counter()
        self.taken: set[str] = set()
        self.spent: set[tuple[str, str]] = set()  # (form, pair) that gave nothing new in TRIES draws
        self.fit: dict[str, bool] = {}

    def query(self, form: str, again: bool = False) -> HardQuery:
        """A query of the form, of another form of its kind where that is spent; with ``again`` it may repeat one.

        Raises:
            ValueError: no pair gives another query of the kind.
        """
        kind = form.partition("_")[0]
        others = [other for other in FORMS[kind] if other != form]
        for wanted in (form, *self.rng.sample(others, len(others))):
            for pair in sorted(self.pairs, key=lambda p: (self.used[wanted, p.name], self.rng.random())):
                found = self._from(wanted, pair, again)
                if found is not None:
                    self.used[wanted, pair.name] += 1
                    self.taken.add(found.sql)
                    return found
        raise ValueError(f"drawing query {len(self.taken) + 1} of {kind}: the pairs give no more; ask for fewer")

    def _from(self, form: str, pair: Pair, again: bool) -> HardQuery | None:
        place, repeat = (form, pair.name), None
        if place in self.spent and not again:
            return None
        for _ in range(6 if place in self.spent else TRIES):
            query = sample_hard(form, pair, self.rng)
            if query is None or query.sql in self.banned or not self._fit(query):
                continue
            if query.sql not in self.taken:
                return query
            repeat = query
        self.spent.add(place)
        return repeat if again else None

    def _fit(self, query: HardQuery) -> bool:
        if query.sql not in self.fit:
            rows = _rows_of(query.sql)
            self.fit[query.sql] = rows is not None and fit(query, rows, _rows_of(query.rival) if query.rival else None)
        return self.fit[query.sql]


def _rows_of(sql: str) -> Rows | None:
    """What the query returns; None where that is too much for any answer."""
    try:
        return hard_database().run(sql)
    except QueryError as error:
        if "more than" in str(error):
            return None
        raise


# -- other names -----------------------------------------------------------------------------------------------

_DATES = "opened closed ordered shipped signed hired born published released paid due_date start_date end_date".split()


@cache
def _reserved() -> frozenset[str]:
    """The words of the held-out pairs."""
    names = all_columns(HELD_OUT_PAIRS) | {table.name for pair in HELD_OUT_PAIRS for table in pair.tables}
    return frozenset(names | {word for name in names for word in name.split("_")})


def renamed_pair(query: HardQuery, rng: random.Random) -> HardQuery:
    """``query`` over a pair that differs in nothing but its names and the text it quotes; see `rename`."""
    taken: set[str] = set()

    def fresh(draw: Any) -> str:
        while (name := draw()) in taken or not _reserved().isdisjoint({name, *name.split("_")}):
            pass
        taken.add(name)
        return name

    columns: dict[Column, Column] = {}
    tables: list[Table] = []
    for table in query.pair.tables:
        thing = fresh(lambda: _pick(_THINGS, rng))
        for column in table.columns:
            name = fresh(lambda column=column: _pick(_DATES, rng) if column.role == "date" else _name(column, rng))
            words = name.replace("_", " ")
            columns[column] = replace(column, name=name, plural=_plural(words), says=(words,))
        own = tuple(columns[column] for column in table.columns)
        tables.append(replace(table, name=thing, rows=thing, columns=own))
    pair = replace(
        query.pair,
        child=tables[0],
        parent=tables[1],
        foreign=columns[query.pair.foreign],
        key=columns[query.pair.key],
        noun=tables[1].name.removesuffix("s"),
    )
    texts: dict[str, str] = {}
    for one in query.where:
        if one.op == "=" and one.sql.startswith("'"):
            texts[one.sql] = f"'{_pick(_TEXTS, rng)}'"
    names = {old.name: new.name for old, new in columns.items()}
    names |= {old.name: new.name for old, new in zip(query.pair.tables, tables, strict=True)}

    def swap(found: re.Match[str]) -> str:
        word = found[0]
        return texts.get(word, word) if word.startswith("'") else names.get(word, word)

    where = tuple(
        Condition(columns[one.column], one.op, texts.get(one.sql, one.sql), texts.get(one.sql, one.says).strip("'"))
        for one in query.where
    )
    slots: dict[str, Any] = {}
    for name, value in query.slots.items():
        slots[name] = columns[value] if isinstance(value, Column) else value
    if query.form == "date_group":
        date = next(column for column in query.columns if column.role == "date")
        slots["cat"] = query.slots["cat"].replace(date.says[0], columns[date].says[0])
    sql = re.sub(r"'[^']*'|[a-z_]\w*", swap, query.sql)
    table = tables[query.table is query.pair.parent]
    return replace(query, pair=pair, table=table, sql=sql, rival="", slots=slots, where=where)


def _plural(words: str) -> str:
    return words if words.endswith("s") else words[:-1] + "ies" if words.endswith("y") else words + "s"


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m text_to_sql.hard_build --out DIR --seed 0``: writes the splits as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m text_to_sql.hard_build", description="Build the hard splits.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, seen.jsonl, ...")
    parser.add_argument("--seed", type=int, default=0, help="draws the training rows (default: 0)")
    parser.add_argument("--train", type=int, default=2000, help="training rows (default: 2000)")
    parser.add_argument("--test", type=int, default=GOLD, help=f"questions a test split (default: {GOLD})")
    options = parser.parse_args(arguments)
    try:
        splits = build_hard(options.seed, options.train, options.test)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{'split':<9}{'rows':>6}{'pairs':>7}{'SQL':>6}  " + "".join(f"{kind:>8}" for kind in HARD_KINDS))
    for split, rows in splits.items():
        with (options.out / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        kinds = Counter(row["kind"] for row in rows)
        pairs, queries = len({row["table"] for row in rows}), len({row["sql"] for row in rows})
        print(f"{split:<9}{len(rows):>6}{pairs:>7}{queries:>6}  " + "".join(f"{kinds[k]:>8}" for k in HARD_KINDS))


if __name__ == "__main__":
    main()
