import json
import pickle

import pytest

from deltaw.data import as_rows, load_rows, where
from deltaw.data.load import locate
from deltaw.errors import DataError

ROWS = [{"prompt": f"p{i}", "completion": 'ü, "quoted"\nline'} for i in range(5)]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    assert load_rows(write(tmp_path / name)) == ROWS


def test_json_objects(tmp_path):
    assert load_rows(write(tmp_path / "a.json", {"version": 1, "data": ROWS})) == ROWS
    both = write(tmp_path / "b.json", {"train": ROWS, "test": ROWS[:1]})
    assert load_rows(both) == ROWS
    assert load_rows(both, "test") == ROWS[:1]
    with pytest.raises(DataError, match="lists \\['test', 'train'\\]; none is the split 'dev'"):
        load_rows(both, "dev")


def test_folders(tmp_path):
    write(tmp_path / "a" / "train.jsonl")
    write(tmp_path / "a" / "test.csv", ROWS[:2])
    assert load_rows(str(tmp_path / "a")) == ROWS
    assert load_rows(str(tmp_path / "a"), "test") == ROWS[:2]
    with pytest.raises(DataError, match=r"no file for the split 'tests'.*did you mean 'test'"):
        load_rows(str(tmp_path / "a"), "tests")
    write(tmp_path / "b" / "data" / "train-00000-of-00002.parquet", ROWS[:3])
    write(tmp_path / "b" / "data" / "train-00001-of-00002.parquet", ROWS[3:])
    assert load_rows(str(tmp_path / "b"), "train") == ROWS
    write(tmp_path / "c" / "only.jsonl")
    assert load_rows(str(tmp_path / "c")) == ROWS


def test_a_single_file_has_no_other_split(tmp_path):
    with pytest.raises(DataError, match="has no split 'test'"):
        load_rows(write(tmp_path / "all.jsonl"), "test")
    assert load_rows(write(tmp_path / "test.jsonl"), "test") == ROWS


def test_limit_is_a_repeatable_draw_in_order(tmp_path):
    name = write(tmp_path / "a.jsonl")
    few = load_rows(name, limit=3, seed=1)
    assert few == load_rows(name, limit=3, seed=1)
    assert few == [row for row in ROWS if row in few]
    assert len({tuple(r["prompt"] for r in load_rows(name, limit=3, seed=s)) for s in range(20)}) > 3
    assert load_rows(name, limit=99) == ROWS
    with pytest.raises(DataError, match="limit"):
        load_rows(name, limit=0)


def test_broken_lines_are_all_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n[1]\n', encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_rows(str(path))
    assert f"{path}:2: " in str(error.value)
    assert f"{path}:3: a list, not an object" in str(error.value)
    (tmp_path / "b.csv").write_text("a,b\n1,2\n1\n1,2,3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"2 broken.*\n.*b.csv:3: not 2 cells.*\n.*b.csv:4"):
        load_rows(str(tmp_path / "b.csv"))
    (tmp_path / "c.json").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"name it \.jsonl"):
        load_rows(str(tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[1, 2]"),
        ("a.json", b"3"),
        ("a.json", b"[" * 100_000),
        ("a.jsonl", b'{"a": "\xff\xfe"}'),
        ("a.jsonl", b""),
        ("a.csv", b""),
        ("a.parquet", b"PAR1 not really"),
        ("a.txt", b"hello"),
    ],
)
def test_garbage_is_one_clear_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="a\\."):
        load_rows(str(tmp_path / name))


def test_what_is_not_there(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        load_rows(str(tmp_path / "no" / "a.jsonl"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="neither a file or folder here"):
        load_rows("nobody/nothing")


def test_as_rows():
    import datasets
    import pandas

    assert as_rows(datasets.Dataset.from_list(ROWS)) == ROWS
    assert as_rows(pandas.DataFrame(ROWS)) == ROWS
    assert as_rows(tuple(ROWS)) == ROWS
    assert as_rows(iter(ROWS)) == ROWS
    for bad, match in [
        ({"train": ROWS}, "pick one split"),
        ("a.jsonl", "load_rows"),
        ([1, 2], "2 of 2 rows are not mappings"),
        (3, "sequence of mappings"),
    ]:
        with pytest.raises(DataError, match=match):
            as_rows(bad)


def test_a_saved_data_set(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "d"))
    assert load_rows(str(tmp_path / "d")) == ROWS
    with pytest.raises(DataError, match="not 'test'"):
        load_rows(str(tmp_path / "d"), "test")


def test_a_glob_is_all_its_files_by_name(tmp_path):
    write(tmp_path / "d" / "b.jsonl", ROWS[2:])
    write(tmp_path / "d" / "a.csv", ROWS[:2])
    write(tmp_path / "d" / "deep" / "c.jsonl", ROWS[:1])
    assert load_rows(f"{tmp_path}/d/*.*") == ROWS
    assert load_rows(f"{tmp_path}/d/[b]*.jsonl", "train") == ROWS[2:]
    assert load_rows(f"{tmp_path}/d/**/*.jsonl") == ROWS[2:] + ROWS[:1]
    with pytest.raises(DataError, match=r"a glob and has no split 'test'"):
        load_rows(f"{tmp_path}/d/*.csv", "test")
    with pytest.raises(DataError, match=r"no file matches .*data files are \['a\.csv', 'b\.jsonl'\]"):
        load_rows(f"{tmp_path}/d/*.parquet")
    (tmp_path / "d" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"no kind that can be read.*notes\.txt"):
        load_rows(f"{tmp_path}/d/*.*")


def test_several_names_are_read_in_turn(tmp_path):
    names = [write(tmp_path / "b.jsonl", ROWS[:2]), write(tmp_path / "a.parquet", ROWS[2:])]
    assert load_rows(names) == ROWS


def test_a_folder_says_when_it_cannot_choose(tmp_path):
    write(tmp_path / "a" / "x.jsonl")
    write(tmp_path / "a" / "y.jsonl")
    with pytest.raises(DataError, match=r"no file for the split 'train'.*all of them: .*/\*\.jsonl"):
        load_rows(str(tmp_path / "a"))
    write(tmp_path / "b" / "train.jsonl")
    write(tmp_path / "b" / "train.csv")
    with pytest.raises(DataError, match=r"several kinds of file.*name one"):
        load_rows(str(tmp_path / "b"))


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet"])
def test_rows_know_where_they_come_from_through_sampling_and_other_processes(tmp_path, name):
    rows = load_rows(write(tmp_path / name), limit=3)
    for row in pickle.loads(pickle.dumps(rows)):
        assert row.file == str(tmp_path / name)
        assert row.where == where(row, 99) == f"{tmp_path / name}:{row.line}"
        assert row == ROWS[int(row["prompt"][1:])]
    assert where({}, 99) == "row 99"
    assert as_rows(rows)[0].where == rows[0].where


def test_classes_are_named_wherever_they_come_from(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]})
    table = table.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    assert [row["label"] for row in as_rows(table)] == ["yes", "no", None]
    table.save_to_disk(str(tmp_path / "d"))
    assert [row["label"] for row in load_rows(str(tmp_path / "d"))] == ["yes", "no", None]


def test_the_hub_is_asked_for_what_is_no_path(monkeypatch):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("someone/set", "test")
    assert rows == ROWS
    assert rows[1].where == "someone/set:2"
    assert list(locate("set", streaming=True).parts()[0]) == ROWS
    assert asked == [("someone/set", "test", False), ("set", "train", True)]


def test_a_fingerprint_of_files_is_of_their_content(tmp_path):
    one = locate(write(tmp_path / "a.jsonl")).fingerprint()
    assert locate(write(tmp_path / "b" / "a.jsonl")).fingerprint() == one
    assert locate(write(tmp_path / "a.jsonl", ROWS[1:])).fingerprint() != one
