"""The text-to-SQL example: no test leaks into training, and the scorer is fair and cannot be harmed."""

from __future__ import annotations

import json
import random
import re
import time

import pytest

from deltaw.errors import MissingExtra
from text_to_sql import tables
from text_to_sql.baseline import Baseline
from text_to_sql.build import TEST_SPLITS, build, main
from text_to_sql.questions import KINDS, sample
from text_to_sql.rename import renamed
from text_to_sql.score import MOST_ROWS, QueryError, execute, extract_sql, same_rows, score
from text_to_sql.tables import HELD_OUT_TABLES, TABLES, TRAIN_TABLES, schema, values
from text_to_sql.wordings import HELD_OUT, TRAIN

SEEDS = (0, 1, 7)


@pytest.fixture(scope="module")
def builds():
    return {seed: build(seed, train=1200) for seed in SEEDS}


@pytest.fixture(scope="module")
def splits(builds):
    return builds[0]


# -- splits --------------------------------------------------------------------------------------------------


def test_no_gold_sql_of_a_test_split_is_ever_trained_on(builds):
    for splits in builds.values():
        trained = {row["sql"] for row in splits["train"]}
        for split in TEST_SPLITS:
            assert not trained & {row["sql"] for row in splits[split]}, split


def test_held_out_tables_and_wordings_stay_out_of_train(builds):
    held = {t.name for t in HELD_OUT_TABLES}
    frames = {frame for kind in KINDS for frame in HELD_OUT.frames[kind]}
    assert len(TRAIN_TABLES) >= 11
    assert len(held) >= 4
    for splits in builds.values():
        assert not held & {row["table"] for row in splits["train"]}
        assert not frames & {row["wording"] for row in splits["train"]}
        for split in ("table", "both"):
            assert {row["table"] for row in splits[split]} == held
        for split in ("wording", "both"):
            assert {row["wording"] for row in splits[split]} <= frames


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_enough_wordings_and_none_on_both_sides(kind):
    seen, held = TRAIN.frames[kind], HELD_OUT.frames[kind]
    assert len(set(seen)) >= 8
    assert len(set(held)) >= 4
    opening = {" ".join(frame.split()[:3]) for frame in seen}
    assert not opening & {" ".join(frame.split()[:3]) for frame in held}


def test_held_out_tables_share_hardly_a_column_with_training():
    trained = {c.name for t in TRAIN_TABLES for c in t.columns}
    held = [c.name for t in HELD_OUT_TABLES for c in t.columns]
    assert {name for name in held if name in trained} <= {"year", "date"}


def test_test_splits_are_balanced_and_never_ask_for_one_sql_twice(splits):
    for split in TEST_SPLITS:
        rows = splits[split]
        assert len({row["sql"] for row in rows}) == len(rows) == 300
        for kind in KINDS:
            assert sum(row["kind"] == kind for row in rows) == 50
    asked = {(row["sql"], row["prompt"][-1]["content"]) for row in splits["train"]}
    assert len(asked) == len(splits["train"]) == 1200


def test_a_seed_fixes_train_and_no_seed_moves_the_tests(builds):
    assert build(0, train=1200) == builds[0]
    assert builds[0]["train"] != builds[1]["train"]
    for seed in SEEDS[1:]:
        assert all(builds[seed][split] == builds[0][split] for split in TEST_SPLITS)


def test_a_smaller_test_is_the_start_of_the_full_one_and_leaves_train_alone(builds):
    small = build(0, train=1200, test=60)
    assert small["train"] == builds[0]["train"]
    for split in TEST_SPLITS:
        assert small[split] == builds[0][split][:60]
        assert {row["kind"] for row in small[split]} == set(KINDS)


@pytest.mark.parametrize(("train", "test"), [(-1, 10), (10, 301), (10, -1)])
def test_sizes_out_of_range_are_named(train, test):
    with pytest.raises(ValueError, match=f"train={train}, test={test}"):
        build(0, train, test)


def test_rows_are_conversations_whose_schema_holds_what_the_sql_names(splits):
    by_name = {t.name: t for t in TABLES}
    for row in splits["train"] + splits["both"]:
        system, user = row["prompt"]
        assert (system["role"], user["role"]) == ("system", "user")
        assert row["completion"] == [{"role": "assistant", "content": row["sql"]}]
        assert "{" not in user["content"]
        named = set(row["sql"].replace("(", " ").replace(")", " ").replace(",", " ").split())
        if row["table"] not in by_name:  # a renamed table: its columns are those that its schema says
            known = {part.split()[0] for part in system["content"].partition("(")[2].rstrip(")").split(", ")}
            assert named & known
            assert f"Table {row['table']}(" in system["content"]
            continue
        for column in by_name[row["table"]].columns:
            if column.name in named - {row["table"]}:
                assert f"{column.name} {column.type}" in system["content"]


def test_every_gold_query_runs_and_scores_full_marks_against_itself(splits):
    real = {t.name for t in TABLES}
    for rows in splits.values():
        rows = [row for row in rows if row["table"] in real]
        result = score([row["completion"][0]["content"] for row in rows], rows)
        assert result.accuracy == 1.0
        assert all(outcome.rows and None not in outcome.rows[0] for outcome in result.outcomes)


def test_top_k_is_asked_only_where_no_two_rows_tie(splits):
    for row in (row for split in TEST_SPLITS for row in splits[split] if row["kind"] == "top"):
        head, tail = row["sql"].split(" order by ")
        number, order, _, k = tail.split()
        table = head.split(" from ")[1]
        ranked = execute(f"select {number} from {table} order by {number} {order} limit {int(k) + 1}")
        assert len(set(ranked)) == int(k) + 1, row["sql"]


def test_tables_are_typed_and_clean():
    for table in TABLES:
        assert 2 <= len(table.columns) <= 8
        for column in table.columns:
            kinds = {type(v).__name__ for v in values(table, column)}
            assert kinds == {{"text": "str", "integer": "int", "real": "float"}[column.type]}, column.name
            if column.role == "date":
                assert all(len(str(v)) == 10 and str(v)[4] == "-" for v in values(table, column))
    cars = TRAIN_TABLES[0]
    assert schema(cars, [cars.column("name"), cars.column("horsepower")]) == "cars(name text, horsepower integer)"


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"vega_datasets.*deltaw\[examples\]"):
        tables.data_folder()


def test_the_command_writes_the_splits(tmp_path, capsys):
    main(["--out", str(tmp_path), "--train", "24", "--test", "12"])
    lines = (tmp_path / "both.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12
    assert [json.loads(line) for line in lines] == build(0, 24, 12)["both"]
    assert {p.stem for p in tmp_path.iterdir()} == {"train", *TEST_SPLITS}
    assert "wording" in capsys.readouterr().out


# -- running untrusted SQL -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "insert into cars select * from cars",
        "update cars set horsepower = 1",
        "delete from cars",
        "drop table cars",
        "create table mine(a)",
        "attach ':memory:' as other",
        "pragma query_only = off",
        "vacuum into 'copy.db'",
        "begin",
        "select * from sqlite_master",
        "select * from pragma_table_info('cars')",
        "select load_extension('x')",
        "select zeroblob(1000000000)",
        "select 1; drop table cars",
        "with recursive n(i) as (select 1 union all select i + 1 from n) select count(*) from n",
        "select count(*) from weather a, weather b, weather c",
        "select a.wind from weather a, weather b order by b.wind + a.wind",
        "select nothing from cars",
        "select '\0'",
        "select '\ud800'",
        "select " + "1," * 5000 + "1",
        "not sql at all",
        "  ",
    ],
)
def test_anything_but_a_bounded_read_is_refused_quickly(sql):
    cars = execute("select count(*), sum(horsepower) from cars")
    start = time.perf_counter()
    with pytest.raises(QueryError):
        execute(sql)
    assert time.perf_counter() - start < 2
    assert execute("select count(*), sum(horsepower) from cars") == cars


def test_too_many_rows_are_refused_and_subqueries_are_not():
    with pytest.raises(QueryError, match=f"more than {MOST_ROWS} rows"):
        execute("select a.name from cars a, cars b")
    assert execute("select m from (select max(horsepower) as m from cars)") == [(230,)]
    assert execute("with fast as (select * from cars where horsepower > 220) select count(*) from fast") == [(4,)]


@pytest.mark.parametrize(
    "text",
    [
        "select 1",
        " select 1 ;\n",
        "```sql\nselect 1;\n```",
        "```\nselect 1\n```",
        "Here it is:\n```SQL\nselect 1\n``` Enjoy!",
        "```select 1```",
        "`select 1`",
        "```sqlite\nselect 1",
    ],
)
def test_sql_is_found_in_an_answer(text):
    assert extract_sql(text) == "select 1"


# -- comparing and scoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "gold", "ordered", "equal"),
    [
        ([("a",), ("b",)], [("b",), ("a",)], False, True),
        ([("a",), ("b",)], [("b",), ("a",)], True, False),
        ([("a",), ("a",)], [("a",), ("b",)], False, False),
        ([("a",), ("a",)], [("a",)], False, False),
        ([(2,)], [(2.0,)], False, True),
        ([(2.0000001,)], [(2.0,)], False, True),
        ([(2.0001,)], [(2.0,)], False, False),
        ([("2",)], [(2,)], False, False),
        ([(None,)], [(0,)], False, False),
        ([("a", 1)], [(1, "a")], False, False),
        ([("a", 1)], [("a",)], False, False),
        ([(1.0 + 1e-12, "b"), (1.0, "a")], [(1.0, "a"), (1.0, "b")], False, True),
        ([], [], False, True),
    ],
)
def test_equal_results(got, gold, ordered, equal):
    assert same_rows(got, gold, ordered) is equal


def test_score_tells_right_from_wrong_from_invalid():
    rows = [
        {"kind": "count", "sql": "select count(*) from cars where cylinders = 8"},
        {"kind": "aggregate", "sql": "select avg(horsepower) from cars"},
        {"kind": "aggregate", "sql": "select max(horsepower) from cars"},
    ]
    answers = [
        "```sql\nSELECT COUNT(name) AS n FROM cars WHERE cylinders = 8;\n```",
        "select avg(weight) from cars",
        "select max(horse) from cars",
    ]
    result = score(answers, rows)
    assert [o.status for o in result.outcomes] == ["correct", "wrong", "invalid"]
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.by_kind == {"count": 1.0, "aggregate": 0.0}
    assert result.counts == {"correct": 1, "wrong": 1, "invalid": 1}
    assert "no such column: horse" in result.outcomes[2].error
    assert len(result.outcomes[1].rows) == 1
    with pytest.raises(ValueError, match="1 predictions against 3 rows"):
        score(["select 1"], rows)


# -- baseline ------------------------------------------------------------------------------------------------


def test_the_baseline_knows_its_training_and_is_no_match_for_new_wordings(splits):
    baseline = Baseline(splits["train"])

    def accuracy(rows):
        return score([baseline.answer({**row, "sql": "", "completion": []}) for row in rows], rows).accuracy

    real = {t.name for t in TABLES}
    assert accuracy([row for row in splits["train"] if row["table"] in real][:120]) > 0.9
    assert 0.4 < accuracy(splits["seen"][:120]) < 0.95
    assert 0.3 < accuracy(splits["both"][:120]) < 0.75


# -- renamed tables ------------------------------------------------------------------------------------------


def test_half_of_train_bears_other_names_and_none_of_a_held_out_table(splits):
    real = {t.name for t in TABLES}
    renamed = [row for row in splits["train"] if row["table"] not in real]
    assert 0.4 < len(renamed) / len(splits["train"]) < 0.6
    held = {c.name for t in HELD_OUT_TABLES for c in t.columns} | {t.name for t in HELD_OUT_TABLES}
    for row in renamed:
        words = set(re.findall(r"[a-z_]+", row["prompt"][0]["content"].partition("Table ")[2]))
        assert not words & held


def test_renaming_keeps_the_query(splits):
    rng = random.Random(0)
    for kind in KINDS:
        drawn = [sample(kind, TRAIN_TABLES[0], rng) for _ in range(50)]
        query = next(q for q in drawn if q is not None)
        other = renamed(query, rng)
        assert other.kind == kind
        assert len(other.sql.split()) == len(query.sql.split())
        assert f"from {other.table.name}" in other.sql
        assert all(column.name in other.sql for column in other.columns)
