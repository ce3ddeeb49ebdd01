"""Rows read while training: their order, memory, workers, and going on from where one was."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from itertools import islice

import pytest
from torch.utils.data import DataLoader

from deltaw.data import (
    RenderSettings,
    StreamedExamples,
    StreamedRows,
    is_stream,
    load_rows,
    readers,
    render,
    render_examples,
)
from deltaw.errors import DataError

ROWS = [{"prompt": f"say {i}", "completion": f"{i}!"} for i in range(200)]
DEFAULT = RenderSettings()


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_one_pass_is_every_row_once_in_an_order_of_seed_and_epoch(tmp_path, kind):
    name = write(tmp_path / f"a.{kind}")
    stream = StreamedRows(name, seed=1, buffer_size=16)
    passes = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        passes.append(list(stream))
    assert passes[0] == passes[2] != passes[1]
    for rows in passes:
        assert Counter(row["prompt"] for row in rows) == Counter(row["prompt"] for row in ROWS)
        assert all(row.where == load_rows(name)[int(row["prompt"][4:])].where for row in rows[:3])
    assert passes[0] != ROWS
    assert list(StreamedRows(name, seed=2, buffer_size=16)) != passes[0]
    assert list(StreamedRows(name, seed=None)) == ROWS
    assert stream.head(3) == ROWS[:3]


def test_sources_come_mixed_and_files_in_a_drawn_order(tmp_path):
    large = write(tmp_path / "large.jsonl", [{"text": f"l{i}"} for i in range(900)])
    small = write(tmp_path / "small.jsonl", [{"text": f"s{i}"} for i in range(100)])
    rows = [row["text"][0] for row in StreamedRows([large, small], seed=0, buffer_size=1)]
    assert Counter(rows) == {"l": 900, "s": 100}
    assert all(rows[i : i + 250].count("s") > 8 for i in range(0, 1000, 250))
    stream = StreamedRows([large, small])
    assert Counter(row["text"][0] for row in stream.head(10)) == {"l": 5, "s": 5}
    for i in range(6):
        write(tmp_path / f"part-{i}.jsonl", [{"text": str(i)}])
    parts = StreamedRows(f"{tmp_path}/part-*.jsonl", buffer_size=1)
    orders = set()
    for epoch in range(5):
        parts.set_epoch(epoch)
        orders.add(tuple(row["text"] for row in parts))
    assert len(orders) > 3


@pytest.mark.parametrize(("kind", "rows"), [("jsonl", 100_000), ("json", 20_000), ("csv", 20_000), ("parquet", 20_000)])
def test_memory_is_the_buffer_whatever_the_size(tmp_path, monkeypatch, kind, rows):
    monkeypatch.setattr(readers, "_CHUNK", 1 << 16)

    def peak(n):
        name = write(tmp_path / f"{n}.{kind}", [{"prompt": f"{i} {'x' * 100}", "completion": "y"} for i in range(n)])
        stream = StreamedRows(name, buffer_size=100)
        list(islice(stream, 10))  # what imports and first calls keep
        tracemalloc.start()
        count = sum(1 for _ in stream)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == n
        return most

    small, large = peak(5000), peak(rows)
    assert large < 1.2 * small
    assert large < rows * 100 / 2


def test_a_broken_row_stops_the_stream_by_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"broken row at .*a\.jsonl:2: "):
        list(StreamedRows(str(path)))
    with pytest.raises(DataError, match="no data at"):
        StreamedRows(str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="buffer_size"):
        StreamedRows(str(path), buffer_size=0)
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        StreamedRows(str(tmp_path / "c.jsonl")).head(3)


def test_a_fingerprint_without_reading_all(tmp_path):
    one = StreamedRows(write(tmp_path / "a.jsonl")).fingerprint()
    assert one == StreamedRows(str(tmp_path / "a.jsonl"), seed=9).fingerprint()
    assert one != StreamedRows(write(tmp_path / "b.jsonl", ROWS[1:])).fingerprint()


def test_examples_are_those_of_render_pass_after_pass(tmp_path, tiny):
    stream = StreamedRows(write(tmp_path / "a.jsonl"), seed=3)
    two = list(StreamedExamples(stream, tiny, DEFAULT, passes=2))
    expected = []
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        expected += [render(row, tiny, DEFAULT).as_features() for row in stream]
    assert two == expected
    assert len(list(islice(StreamedExamples(stream, tiny, DEFAULT), 900))) == 900  # without end


def batches_of(examples, size, workers, count=60):
    loader = DataLoader(examples, batch_size=size, collate_fn=list, num_workers=workers)
    return list(islice(loader, count))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("settings", [DEFAULT, RenderSettings(max_length=24, overlong="drop")])
def test_batches_are_the_same_for_any_number_of_workers(tmp_path, tiny, settings):
    mixed = [*ROWS, *({"text": "words " * (i % 9)} for i in range(1, 60))]  # some become several examples
    stream = StreamedRows(write(tmp_path / "a.jsonl", mixed), seed=3)
    alone = batches_of(StreamedExamples(stream, tiny, settings, batch_size=8), 8, 0)
    flat = [example for batch in alone for example in batch]
    counted = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        counted += [one.as_features() for row in stream for one in render_examples(row, tiny, settings)]
    assert flat == counted[: len(flat)]
    for workers in (1, 3):
        assert batches_of(StreamedExamples(stream, tiny, settings, batch_size=8), 8, workers) == alone


def test_a_row_that_cannot_be_learned_from_stops_by_its_line(tmp_path, tiny):
    rows = [*ROWS[:2], {"prompt": "x", "completion": "y" * 99}]
    name = write(tmp_path / "a.jsonl", rows)
    short = RenderSettings(max_length=40)
    with pytest.raises(DataError, match=r"a\.jsonl:3: its \d+ tokens .*max_length=40.*\[truncated-answer\]"):
        list(StreamedExamples(StreamedRows(name), tiny, short, passes=1))
    allowed = StreamedExamples(StreamedRows(name), tiny, short, passes=1, allow=["truncated-answer"])
    assert max(len(one["input_ids"]) for one in allowed) == 40
    cut = RenderSettings(max_length=40, overlong="truncate")
    assert len(list(StreamedExamples(StreamedRows(name), tiny, cut, passes=1))) == 3
    with pytest.raises(DataError, match=r"a\.jsonl:1: dataset_format is 'alpaca'"):
        list(StreamedExamples(StreamedRows(name, seed=None), tiny, RenderSettings(dataset_format="alpaca"), passes=1))
    none = RenderSettings(max_length=2, overlong="drop")
    with pytest.raises(DataError, match="the stream gives no examples"):
        next(iter(StreamedExamples(StreamedRows(name), tiny, none)))


def test_what_is_a_stream(tmp_path):
    import datasets

    assert is_stream(StreamedRows(write(tmp_path / "a.jsonl")))
    assert is_stream(datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    assert not is_stream(ROWS)
    assert not is_stream(iter(ROWS))
    assert not is_stream(datasets.Dataset.from_list(ROWS))
