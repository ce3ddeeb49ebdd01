import gc
import os

import pytest

from deltaw.data import as_rows, draw, load_rows, mix, split_rows, stored, tokenize_rows
from deltaw.data.rows import Row
from deltaw.data.stored import RowStore, joined, pick

ROWS = [Row({"text": f"row {i}", "n": i, "when": None, "raw": b"\xff"}, "a.parquet", i + 1) for i in range(100)]


@pytest.fixture(params=[1, 30, 1000])
def rows(request, monkeypatch):
    monkeypatch.setattr(stored, "IN_MEMORY", request.param)
    monkeypatch.setattr(stored, "_AT_ONCE", 300)
    store = RowStore()
    for row in ROWS:
        store.add(row)
    found = store.rows()
    assert isinstance(found, list) == (request.param > 100)
    return found


def test_a_store_is_the_list_it_was_made_of(rows):
    assert len(rows) == 100
    assert list(rows) == ROWS
    assert [row.where for row in rows] == [row.where for row in ROWS]
    assert rows[7] == ROWS[7]
    assert rows[-1].where == "a.parquet:100"
    assert list(rows[90:10:-7]) == ROWS[90:10:-7]
    assert list(reversed(rows)) == ROWS[::-1]
    with pytest.raises(IndexError):
        rows[100]
    assert as_rows(rows)[3] == ROWS[3]
    rows[3]["text"] = "changed"
    if not isinstance(rows, list):
        assert rows[3]["text"] == "row 3"
    else:
        rows[3]["text"] = "row 3"


def test_views_are_what_lists_would_be(rows):
    few = [Row({"text": "x"}, "b.jsonl", 1)]
    both = joined([few, rows, few])
    expected = [*few, *ROWS, *few]
    assert list(both) == [both[i] for i in range(102)] == expected
    assert both[-1] == few[0]
    assert list(pick(both, [5, 101, 5])) == [expected[5], expected[101], expected[5]]
    assert joined([rows]) is rows
    assert list(draw(rows, 10, 3)) == draw(ROWS, 10, 3)
    assert draw(rows, 100, 3) is rows
    assert list(mix([rows, few], [1, 1], seed=2)[0]) == mix([ROWS, few], [1, 1], seed=2)[0]
    assert split_rows(rows, 0.2, group_column="n") == split_rows(ROWS, 0.2, group_column="n")


def test_tokens_are_the_same(rows, tiny):
    one, other = tokenize_rows(rows, tiny), tokenize_rows(ROWS, tiny)
    assert (one.ids == other.ids).all()


def test_a_large_file_takes_its_places_in_memory_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "IN_MEMORY", 50)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"row {i},a\n" for i in range(500)))
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    rows = load_rows(str(path))
    assert not isinstance(rows, list)
    assert [row["text"] for row in rows] == [f"row {i}" for i in range(500)]
    assert rows[499].where == f"{path}:501"
    assert not list((tmp_path / "temporary").iterdir())
    del rows
    gc.collect()
    assert not open_before or len(os.listdir("/proc/self/fd")) == open_before
