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
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

from .build import DROP_COLUMN, INSTRUCTION, RENAMED, TEST_SPLITS
from .draw import Draw, training_rows
from .hard_ask import ask_hard
from .hard_questions import FORMS, HARD_KINDS, HardQuery, fit, sample_hard
from .hard_wordings import HARD_HELD_OUT, HARD_TRAIN, HardWordings
from .pairs import HELD_OUT_PAIRS, TRAIN_PAIRS, Pair, all_columns, connect_pairs
from .questions import Condition
from .rename import TEXTS, THINGS, new_name, pick
from .score import FUNCTIONS, Database, QueryError, Rows
from .tables import Column, Table, plural_of, schema, words_of

__all__ = ["build_hard", "hard_database", "hard_prompt"]

Row = dict[str, Any]
GOLD = 300  # queries a test set


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
    draw = _draw(random.Random(f"hard {' '.join(pair.name for pair in pairs)}"), pairs)
    return tuple(draw.query(form) for form in _forms())


def _test(split: str) -> list[Row]:
    pairs = TRAIN_PAIRS if split in ("seen", "wording") else HELD_OUT_PAIRS
    words = HARD_TRAIN if split in ("seen", "table") else HARD_HELD_OUT
    rng = random.Random(f"hard words {split}")
    return [_row(query, words, rng) for query in _gold(pairs)]


def _train(seed: int, size: int) -> list[Row]:
    rng = random.Random(f"hard train {seed}")
    banned = {query.sql for pairs in (TRAIN_PAIRS, HELD_OUT_PAIRS) for query in _gold(pairs)} if size else set()
    draw = _draw(rng, TRAIN_PAIRS, banned)

    def row(form: str) -> Row:
        query = draw.query(form, again=True)
        return _row(renamed_pair(query, rng) if rng.random() < RENAMED else query, HARD_TRAIN, rng, vary=True)

    return training_rows(size, _forms(), row, rng)


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


def _draw(rng: random.Random, pairs: Sequence[Pair], banned: Collection[str] = ()) -> Draw[Pair, HardQuery]:
    return Draw(rng, pairs, sample_hard, _is_fit, _other_forms, banned, again=6)


def _other_forms(form: str) -> list[str]:
    """The other forms of its kind."""
    return [other for other in FORMS[form.partition("_")[0]] if other != form]


def _is_fit(query: HardQuery) -> bool:
    rows = _rows_of(query.sql)
    return rows is not None and fit(query, rows, _rows_of(query.rival) if query.rival else None)


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
        thing = fresh(lambda: pick(THINGS, rng))
        for column in table.columns:
            name = fresh(lambda column=column: pick(_DATES, rng) if column.role == "date" else new_name(column, rng))
            words = words_of(name)
            columns[column] = replace(column, name=name, plural=plural_of(words), says=(words,))
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
            texts[one.sql] = f"'{pick(TEXTS, rng)}'"
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
