"""Builds the splits: balanced over kinds and tables, no gold SQL of a test split in train.

Two sets of gold queries are tested, one over the training tables and one over the held-out tables, each asked
twice, in training wordings and in held-out wordings, so that two splits differ in one thing only:

                        training wordings   held-out wordings
    training tables     seen                wording
    held-out tables     table               both

The test splits are the same for every seed. Knows nothing of models or of who answers.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .draw import Draw, training_rows
from .questions import KINDS, Query, ask, sample, sound
from .rename import renamed
from .score import execute
from .tables import HELD_OUT_TABLES, TRAIN_TABLES, Column, Table, schema
from .wordings import HELD_OUT, TRAIN, Wordings

__all__ = ["INSTRUCTION", "TEST_SPLITS", "build", "prompt"]

Row = dict[str, Any]

INSTRUCTION = "Write one SQLite query."
TEST_SPLITS = ("seen", "wording", "table", "both")
#: the kinds in the training rows' proportions: those that are learned slowly come more often
TRAIN_MIX = (*KINDS, "compare", "top")
#: share of the training rows whose table bears other names; their SQL is not for this database
RENAMED = 0.5
BANNED = 300  # gold queries a set that never occur in train, so that train is the same for any smaller ``test``
DROP_COLUMN = 0.25  # chance that a training prompt leaves out a column that the question does not need


def prompt(table: Table, question: str, columns: Sequence[Column] | None = None) -> list[dict[str, str]]:
    """The messages before the answer: the instruction with the schema, and the question."""
    return [
        {"role": "system", "content": f"{INSTRUCTION} Table {schema(table, columns)}"},
        {"role": "user", "content": question},
    ]


def build(seed: int = 0, train: int = 2000, test: int = 300) -> dict[str, list[Row]]:
    """The splits ``train``, ``seen``, ``wording``, ``table`` and ``both``.

    A row holds ``prompt`` and ``completion`` (lists of messages), ``table``, ``kind``, ``sql``, ``wording``.

    Args:
        seed: draws the training rows; the test splits do not depend on it.
        train: number of training rows; a kind with too few queries asks some again, in other words.
        test: questions in each test split, at most 300; fewer are the first of the 300, as balanced.

    Raises:
        ValueError: ``train`` or ``test`` is out of range.
        MissingExtra: ``vega_datasets`` is not installed.
    """
    if train < 0 or not 0 <= test <= BANNED:
        raise ValueError(f"building train={train}, test={test}: train is 0 or more, test from 0 to {BANNED}")
    splits = {"train": _train(seed, train)}
    for split in TEST_SPLITS:
        splits[split] = _test(split)[:test]
    return splits


@cache
def _gold(tables: tuple[Table, ...]) -> tuple[Query, ...]:
    """The gold queries of the two test splits over these tables: no two alike."""
    draw = _draw(random.Random(f"test {' '.join(t.name for t in tables)}"), tables)
    queries = [draw.query(KINDS[n % len(KINDS)]) for n in range(BANNED)]
    return tuple(queries)


def _test(split: str) -> list[Row]:
    tables = TRAIN_TABLES if split in ("seen", "wording") else HELD_OUT_TABLES
    wordings = TRAIN if split in ("seen", "table") else HELD_OUT
    rng = random.Random(f"words {split}")
    return [_row(query, wordings, rng) for query in _gold(tables)]


def _train(seed: int, size: int) -> list[Row]:
    rng = random.Random(f"train {seed}")
    banned = {q.sql for tables in (TRAIN_TABLES, HELD_OUT_TABLES) for q in _gold(tables)}
    draw = _draw(rng, TRAIN_TABLES, banned)

    def row(kind: str) -> Row:
        query = draw.query(kind, again=True)
        return _row(renamed(query, rng) if rng.random() < RENAMED else query, TRAIN, rng, vary=True)

    return training_rows(size, TRAIN_MIX, row, rng)


def _row(query: Query, wordings: Wordings, rng: random.Random, vary: bool = False) -> Row:
    question, wording = ask(query, wordings, rng)
    columns = list(query.table.columns)
    if vary:  # a schema that is never the same twice has to be read, which is what an unseen table asks for
        columns = [c for c in columns if c in query.columns or rng.random() >= DROP_COLUMN]
        rng.shuffle(columns)
    return {
        "prompt": prompt(query.table, question, columns),
        "completion": [{"role": "assistant", "content": query.sql}],
        "table": query.table.name,
        "kind": query.kind,
        "sql": query.sql,
        "wording": wording,
    }


def _draw(rng: random.Random, tables: Sequence[Table], banned: Collection[str] = ()) -> Draw[Table, Query]:
    return Draw(rng, tables, sample, lambda query: sound(query, execute(query.sql)), _other_kinds, banned, again=8)


def _other_kinds(kind: str) -> list[str]:
    return [other for other in KINDS if other != kind]


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m text_to_sql.build --out DIR --seed 0``: writes the splits as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m text_to_sql.build", description="Build the text-to-SQL splits.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, seen.jsonl, ...")
    parser.add_argument("--seed", type=int, default=0, help="draws the training rows (default: 0)")
    parser.add_argument("--train", type=int, default=2000, help="training rows (default: 2000)")
    parser.add_argument("--test", type=int, default=BANNED, help=f"questions a test split (default: {BANNED})")
    options = parser.parse_args(arguments)
    try:
        splits = build(options.seed, options.train, options.test)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{'split':<9}{'rows':>6}{'tables':>8}{'SQL':>6}  " + "".join(f"{kind:>11}" for kind in KINDS))
    for split, rows in splits.items():
        with (options.out / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        kinds = Counter(row["kind"] for row in rows)
        tables, queries = len({row["table"] for row in rows}), len({row["sql"] for row in rows})
        counts = "".join(f"{kinds[kind]:>11}" for kind in KINDS)
        print(f"{split:<9}{len(rows):>6}{tables:>8}{queries:>6}  {counts}")


if __name__ == "__main__":
    main()
