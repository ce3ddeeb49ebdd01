"""The hard text-to-SQL set: no test leaks into training, every hard part matters, and the script runs to its table."""

from __future__ import annotations

import json
import random
import re

import pytest
from tinychat import tiny_model, tiny_tokenizer

from text_to_sql import hard
from text_to_sql.build import TEST_SPLITS
from text_to_sql.hard_baseline import HardBaseline
from text_to_sql.hard_build import build_hard, hard_database, main, renamed_pair
from text_to_sql.hard_questions import FORMS, HARD_KINDS, sample_hard
from text_to_sql.hard_wordings import HARD_HELD_OUT, HARD_TRAIN
from text_to_sql.pairs import HELD_OUT_PAIRS, PAIRS, TRAIN_PAIRS, all_columns, cells, nullable
from text_to_sql.score import QueryError, execute, same_rows, score

NAMES = {pair.name: pair for pair in PAIRS}


@pytest.fixture(scope="module")
def builds():
    return {seed: build_hard(seed, train=500) for seed in (0, 1)}


@pytest.fixture(scope="module")
def splits(builds):
    return builds[0]


# -- tables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_pair_joins_on_keys_that_are_there_and_shares_no_column_name(pair):
    names = [column.name for table in pair.tables for column in table.columns]
    assert len(names) == len(set(names))
    keys = cells(pair, pair.key)
    assert len(set(keys)) == len(keys), "a parent's key must be unique, or a join would double rows"
    assert {value for value in cells(pair, pair.foreign) if value is not None} <= set(keys)
    for table in pair.tables:
        for column in table.columns:
            kinds = {type(value).__name__ for value in cells(pair, column) if value is not None}
            assert kinds <= {"text": {"str"}, "integer": {"int"}, "real": {"float", "int"}}[column.type], column.name


def test_some_values_are_missing_on_both_sides():
    for pairs in (TRAIN_PAIRS, HELD_OUT_PAIRS):
        assert sum(nullable(pair, c) for pair in pairs for table in pair.tables for c in table.columns) >= 4


def test_held_out_pairs_share_hardly_a_column_with_training():
    assert all_columns(TRAIN_PAIRS) & all_columns(HELD_OUT_PAIRS) <= {"year", "date"}


# -- splits --------------------------------------------------------------------------------------------------


def test_no_gold_sql_of_a_test_split_is_ever_trained_on(builds):
    for splits in builds.values():
        trained = {row["sql"] for row in splits["train"]}
        for split in TEST_SPLITS:
            assert not trained & {row["sql"] for row in splits[split]}, split


def test_held_out_pairs_and_wordings_stay_out_of_train(builds):
    held = {pair.name for pair in HELD_OUT_PAIRS}
    frames = {frame for each in HARD_HELD_OUT.frames.values() for frame in each}
    assert not frames & {frame for each in HARD_TRAIN.frames.values() for frame in each}
    for splits in builds.values():
        assert not held & {row["table"] for row in splits["train"]}
        assert not frames & {row["wording"] for row in splits["train"]}
        assert {row["table"] for row in splits["both"]} == {row["table"] for row in splits["table"]} == held
        assert {row["wording"] for row in splits["wording"] + splits["both"]} <= frames


def test_test_splits_are_balanced_and_never_ask_for_one_sql_twice(splits):
    for split in TEST_SPLITS:
        rows = splits[split]
        assert len({row["sql"] for row in rows}) == len(rows) == 300
        for kind in HARD_KINDS:
            assert sum(row["kind"] == kind for row in rows) == 75
        assert {row["form"] for row in rows} == {form for forms in FORMS.values() for form in forms}
    assert [row["sql"] for row in splits["seen"]] == [row["sql"] for row in splits["wording"]]
    assert [row["sql"] for row in splits["table"]] == [row["sql"] for row in splits["both"]]


def test_a_seed_fixes_train_and_no_seed_moves_the_tests(builds):
    assert build_hard(0, train=60)["train"] != build_hard(1, train=60)["train"]
    assert build_hard(0, train=60) == build_hard(0, train=60)
    assert all(builds[1][split] == builds[0][split] for split in TEST_SPLITS)
    small = build_hard(0, train=0, test=8)
    assert all(small[split] == builds[0][split][:8] for split in TEST_SPLITS)
    with pytest.raises(ValueError, match="test=301"):
        build_hard(0, 10, 301)


def test_every_gold_query_runs_to_a_clear_answer_and_scores_full_marks(splits):
    run = hard_database().run
    for split in TEST_SPLITS:
        rows = splits[split]
        result = score([row["completion"][0]["content"] for row in rows], rows, run)
        assert result.accuracy == 1.0
        for outcome in result.outcomes:
            assert outcome.rows
            assert outcome.rows != [(0,)]
            assert not any(value is None for row in outcome.rows for value in row), outcome.gold


def test_the_hard_part_of_a_question_is_needed(splits):
    """A missing fill, a forgotten condition or a dropped HAVING gives another answer."""
    run = hard_database().run
    careless = {
        "null_fill": lambda sql: re.sub(r"coalesce\((\w+), \d+\)", r"\1", sql),
        "having_count": lambda sql: re.sub(r" having .*", "", sql),
        "having_value": lambda sql: re.sub(r" having .*", "", sql),
    }
    for row in (row for split in ("seen", "table") for row in splits[split]):
        if (worse := careless.get(row["form"])) is not None:
            assert worse(row["sql"]) != row["sql"]
            assert not same_rows(run(worse(row["sql"])), run(row["sql"]), ordered=False), row["sql"]
        words = {"join": " join ", "null": " null|coalesce", "date": "between|strftime", "having": " having "}
        assert re.search(words[row["kind"]], row["sql"])


def test_the_schemas_hold_what_the_sql_names(splits):
    for row in splits["train"] + splits["both"]:
        system = row["prompt"][0]["content"]
        question = row["prompt"][1]["content"]
        assert "{" not in question
        assert "  " not in question
        known = set(re.findall(r"[a-z_]\w*", system.partition("Tables ")[2]))
        sql = re.sub(r"'[^']*'", "", row["sql"])
        keywords = set(
            "select from join on where and between is not null group by having count avg sum min max coalesce strftime "
            "as".split()
        )
        assert set(re.findall(r"[a-z_]\w*", sql)) - keywords <= known, row["sql"]


def test_half_of_train_bears_other_names(splits):
    others = [row for row in splits["train"] if row["table"] not in NAMES]
    assert 0.4 < len(others) / len(splits["train"]) < 0.6
    held = (all_columns(HELD_OUT_PAIRS) - {"year", "date"}) | {t.name for pair in HELD_OUT_PAIRS for t in pair.tables}
    for row in others:
        schemas = row["prompt"][0]["content"].partition("Tables ")[2]
        assert not held & set(re.findall(r"[a-z_]\w*", schemas))


@pytest.mark.parametrize("form", [form for forms in FORMS.values() for form in forms])
def test_renaming_keeps_the_query(form):
    rng = random.Random(0)
    drawn = [sample_hard(form, pair, rng) for pair in TRAIN_PAIRS for _ in range(30)]
    for query in [q for q in drawn if q is not None][:20]:
        other = renamed_pair(query, rng)
        assert re.sub(r"'[^']*'|[a-z_]\w*", "", other.sql) == re.sub(r"'[^']*'|[a-z_]\w*", "", query.sql)
        assert re.findall(r"'%\w'|'\d[^']*'", other.sql) == re.findall(r"'%\w'|'\d[^']*'", query.sql)
        assert {column.role for column in other.columns} == {column.role for column in query.columns}
        assert query.pair.child.name not in other.sql


# -- running untrusted SQL -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "delete from cars",
        "select load_extension('x')",
        "select * from sqlite_master",
        "select count(*) from weather a, weather b, weather c",
        "select 1; select 2",
    ],
)
def test_anything_but_a_bounded_read_is_refused(sql):
    with pytest.raises(QueryError):
        hard_database().run(sql)


def test_the_two_sets_do_not_see_each_other():
    assert hard_database().run("select count(*) from makers")[0][0] == 30
    with pytest.raises(QueryError):
        execute("select count(*) from makers")
    with pytest.raises(QueryError):
        execute("select strftime('%Y', date) from weather")


# -- answering -----------------------------------------------------------------------------------------------


def test_the_baseline_knows_its_training_and_little_more(splits):
    baseline = HardBaseline(splits["train"])
    run = hard_database().run

    def accuracy(rows):
        return score([baseline.answer({**row, "sql": "", "completion": []}) for row in rows], rows, run).accuracy

    assert accuracy([row for row in splits["train"] if row["table"] in NAMES][:60]) > 0.5
    assert 0.05 < accuracy(splits["both"][:100]) < 0.4


def test_the_script_trains_tells_and_goes_on(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "tiny"
    tiny_model(window=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    out = tmp_path / "hard.json"
    command = ["--steps", "1", "--questions", "2", "--train-rows", "8", "--model", str(folder), "--out", str(out)]
    monkeypatch.setattr(hard, "MAX_NEW_TOKENS", 4)
    assert hard.main(["--arms", "base", "easy", "hard", *command]) == 0
    text = capsys.readouterr().out
    for said in (hard.ARMS[arm] for arm in ("base", "easy", "hard")):
        assert text.count(f"| {said} | 1 |") == 2
    before = out.read_bytes()
    monkeypatch.setattr(hard, "one_arm", lambda *arguments: pytest.fail("it was finished already"))
    assert hard.main(["--arms", "base", "easy", "hard", *command]) == 0
    assert out.read_bytes() == before
    assert capsys.readouterr().out == text
    runs = json.loads(out.read_text())
    assert {run["arm"] for run in runs} == {"base", "easy", "hard"}
    assert all(len(run["right"]["both"]["join"]) == 1 for run in runs)


def test_the_command_writes_the_splits(tmp_path, capsys):
    main(["--out", str(tmp_path), "--train", "24", "--test", "12"])
    assert [json.loads(line) for line in (tmp_path / "both.jsonl").read_text(encoding="utf-8").splitlines()] == (
        build_hard(0, 24, 12)["both"]
    )
    assert {path.stem for path in tmp_path.iterdir()} == {"train", *TEST_SPLITS}
    assert "having" in capsys.readouterr().out
