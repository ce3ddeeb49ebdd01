import json
import math

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis import given

from deltaw.data import StreamedRows, load_rows, readers
from deltaw.data.readers import read_file
from deltaw.data.rows import Fault
from deltaw.errors import DataError

ROWS = [{"a": "x\ny", "n": 1.5e3, "l": [1, None, {"k": "]"}]}, {}, {"a": "ü😀\\", "b": True}]


def read(path, content, **kwargs):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_file(path, **kwargs))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_a_json_list_through_a_window_of_any_size(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    text = json.dumps(ROWS, indent=indent)
    found = read(tmp_path / "a.json", " \n" + text + "\n")
    assert found == ROWS
    if indent is None:
        assert [row.line for row in found] == [2, 2, 2]
    else:
        lines = (" \n" + text).split("\n")
        assert [lines[row.line - 1].strip()[0] for row in found] == ["{", "{", "{"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), max_size=5), chunk=st.integers(1, 40))
def test_any_list_is_read_as_the_standard_library_reads_it(tmp_path_factory, rows, chunk):
    path = tmp_path_factory.mktemp("json") / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK", chunk)
        assert read(path, json.dumps(rows)) == rows


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "line", "why"),
    [
        ('[{"a": 1}\n,{"a": }]', 2, "Expecting value"),
        ('[{"a": 1}\n\n{"a": 2}]', 3, "Expecting ',' delimiter"),
        ('[{"a": 1}', 1, "Expecting ',' delimiter"),
        ('[\n{"a": 1},\n]', 3, "Expecting value"),
        ('[{"a": "x}]', 1, "Unterminated string"),
        ('[{"a": 1}]\n[', 2, "Extra data"),
        ('[{"a": tru', 1, "Expecting value"),
        ("[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_a_broken_list_names_the_line_whatever_the_window(tmp_path, monkeypatch, chunk, content, line, why):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    [*rows, fault] = read(tmp_path / "a.json", content)
    assert all(row == {"a": 1} for row in rows)
    assert isinstance(fault, Fault)
    assert fault.where == f"{tmp_path / 'a.json'}:{line}"
    assert why in fault.why


def test_every_bad_line_is_a_fault_and_the_others_are_rows(tmp_path):
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": NaN}\n' + b"[" * 100_000
    found = read(tmp_path / "a.jsonl", content)
    assert found[0] == {"a": 1}
    assert math.isnan(found[4]["a"])
    assert [row.line for row in found if not isinstance(row, Fault)] == [1, 6]
    assert [int(item.where.rpartition(":")[2]) for item in found if isinstance(item, Fault)] == [3, 4, 5, 7]


def test_csv_rows_know_their_first_line(tmp_path):
    found = read(tmp_path / "a.csv", 'a,b\n1,"x\ny"\n\n2\n3,z\n')
    assert [item.line if not isinstance(item, Fault) else item for item in found] == [
        2,
        Fault(f"{tmp_path / 'a.csv'}:5", "not 2 cells, as the header has"),
        6,
    ]
    assert found[0] == {"a": "1", "b": "x\ny"}
    with pytest.raises(DataError, match=r"a\.csv:1: the header names \['a'\] more than once"):
        read(tmp_path / "a.csv", "a,b,a\n1,2,3\n")


def test_parquet_drops_the_nulls_that_columns_add_and_names_classes(tmp_path):
    import datasets

    messages = [
        [{"role": "user", "content": "a", "tool_calls": None}],
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"name": "g", "arguments": {"y": 2}}]}],
    ]
    table = datasets.Dataset.from_dict({"messages": messages, "label": [0, 1, -1]}).cast_column(
        "label", datasets.ClassLabel(names=["no", "yes"])
    )
    assert table[1]["messages"][0]["tool_calls"][0]["arguments"] == {"x": 1, "y": None}  # what columns do
    table.to_parquet(tmp_path / "a.parquet")
    found = list(read_file(tmp_path / "a.parquet"))
    assert [row["label"] for row in found] == ["no", "yes", None]
    assert found[0]["messages"] == [{"role": "user", "content": "a"}]
    assert found[1]["messages"][0]["tool_calls"] == [{"name": "f", "arguments": {"x": 1}}]
    assert [row.line for row in found] == [1, 2, 3]


def test_an_object_is_refused_where_a_stream_was_meant(tmp_path):
    assert read(tmp_path / "a.json", '{"train": [{"a": 1}, 2]}')[0] == {"a": 1}
    with pytest.raises(DataError, match=r"write it as \.jsonl"):
        read(tmp_path / "a.json", '{"train": [{"a": 1}]}', whole=False)


def refused_or_read(path):
    """What is wrong with how a file is read, in memory or streamed: nothing, if there are rows or one clear error."""
    for read_it in (lambda: load_rows(str(path)), lambda: list(StreamedRows(str(path)))):
        try:
            read_it()
        except DataError as error:
            if path.name not in str(error):
                return str(error)
    return ""


TEXT = st.text(alphabet='{}[]",:\\ \n\r01a\x00\ufeffé', max_size=40).map(str.encode)


@hypothesis.settings(max_examples=300)
@given(suffix=st.sampled_from(["jsonl", "json", "csv", "parquet"]), content=st.binary(max_size=60) | TEXT)
def test_no_file_does_more_than_be_refused(tmp_path_factory, suffix, content):
    path = tmp_path_factory.mktemp("fuzz") / f"data.{suffix}"
    path.write_bytes(content)
    assert not refused_or_read(path)


def test_a_file_that_the_system_does_not_give(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    reading = read_file(path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: No such file"):
        list(reading)
