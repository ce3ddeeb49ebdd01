"""The rows of a run: split before they are mixed, labels found, streams begun; and all of it told."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest
from tinychat import save_tiny

from deltaw import rundata
from deltaw.config import RunConfig, load_run_config
from deltaw.data import StreamedExamples, StreamedRows, TokenDataset
from deltaw.errors import DataError
from deltaw.pipeline import run_training
from deltaw.rundata import prepare_data, read_data, read_rows


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("base")))


@pytest.fixture
def describe(base, tmp_path):
    def config(name, **keys) -> RunConfig:
        return RunConfig(
            **{
                "model_name_or_path": base, "dataset_name": name, "use_cpu": True, "dataset_cache": False,
                "output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 2,
                "logging_steps": 1, "r": 4, "max_length": 256, **keys,
            }
        )  # fmt: skip

    return config


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(n, start=0, **columns):
    return [{"prompt": f"say {i}", "completion": f"{i}!", **columns} for i in range(start, start + n)]


def test_what_is_held_out_is_never_drawn_however_often_sources_repeat(describe, tmp_path):
    names = [write(tmp_path / "a.jsonl", asked(10)), write(tmp_path / "b.jsonl", asked(90, 100))]
    told: list[str] = []
    train, held_out = read_rows(describe(names, dataset_weights=[3, 1], val_size=0.2), told.append)
    assert len(held_out) == 20
    assert len(train) == 80
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    shares = Counter(row.file for row in train)
    assert shares == {names[0]: 60, names[1]: 20}
    assert any("held out 20 of 100 rows" in line for line in told)
    assert any(line.startswith(f"{names[0]}: 60 draws from ") for line in told)


def test_a_limit_is_of_what_is_trained_on(describe, tmp_path):
    name = write(tmp_path / "a.jsonl", asked(50))
    train, held_out = read_rows(describe(name, val_size=0.2, max_train_samples=30, max_eval_samples=4), print)
    assert (len(train), len(held_out)) == (30, 4)
    names = [name, write(tmp_path / "b.jsonl", asked(50, 100))]
    train, held_out = read_rows(describe(names, dataset_weights=[1, 3], max_train_samples=40), print)
    assert held_out is None
    assert Counter(row.file for row in train) == {names[0]: 10, names[1]: 30}
    assert len(read_rows(describe(names), print)[0]) == 100


def test_groups_stay_on_one_side_and_their_column_is_no_unread_one(describe, tmp_path):
    rows = [row | {"film": f"f{i % 5}", "stars": 3} for i, row in enumerate(asked(50))]
    config = describe(write(tmp_path / "a.jsonl", rows), val_size=0.2, val_group_column="film")
    told: list[str] = []
    data = read_data(config, told.append)
    sides = [{data.rows[i]["film"] for i in set(data.dataset.rows.tolist())}, {"f0", "f1", "f2", "f3", "f4"}]
    assert len(sides[1] - sides[0]) == 1
    assert len(data.eval_dataset) == 10
    assert any("1 of 5 values of 'film'" in line for line in told)
    assert "'stars'" in data.report.find("unread-columns").message
    assert "film" not in data.report.find("unread-columns").message


def test_evaluation_rows_of_their_own(describe, tmp_path):
    name = write(tmp_path / "a.jsonl", asked(9))
    test = write(tmp_path / "b.jsonl", asked(5, 100))
    data = prepare_data(describe(name, eval_dataset_name=test, max_eval_samples=3), print)
    assert (len(data.train_dataset), len(data.eval_dataset)) == (9, 3)
    assert isinstance(data.train_dataset, TokenDataset)
    assert data.train_dataset is data.dataset
    lengths = [len(one.input_ids) for one in data.shortest()]
    assert lengths == sorted(data.dataset.lengths)[:4]


def test_labels_are_found_told_and_kept_for_whoever_reads_the_run_again(describe, tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "label"], *([f"film {i}", "no" if i % 2 else "yes"] for i in range(8))])
    told: list[str] = []
    config = describe(str(path))
    data = prepare_data(config, told.append)
    assert "format: classification (8 rows)" in told
    assert "labels: no, yes" in told
    assert data.described(config).dataset_label_names == ["no", "yes"]
    text = data.tokenizer.decode(data.dataset.arrays(0)[0])
    assert "no, yes" in text
    assert text.endswith("yes<|im_end|>")
    run_training(config, quiet=True)
    again = load_run_config(tmp_path / "out" / "run.yaml")
    assert again.dataset_label_names == ["no", "yes"]


def test_label_names_that_nothing_reads(describe, tmp_path):
    name = write(tmp_path / "a.jsonl", asked(4))
    with pytest.raises(DataError, match="no row has a text and a label"):
        read_data(describe(name, dataset_label_names=["a", "b"]), print)


def test_pairs_are_refused_once_for_all_rows(describe, tmp_path):
    name = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    with pytest.raises(DataError, match=r"(?s)3 of 3 rows.*a\.jsonl:1: it is a preference pair.*DPO"):
        read_data(describe(name), print)


def test_a_stream_is_checked_at_its_beginning_and_trained_on(describe, tmp_path):
    name = write(tmp_path / "a.jsonl", asked(30))
    told: list[str] = []
    config = describe(name, dataset_streaming=True, max_steps=4)
    data = prepare_data(config, told.append)
    assert isinstance(data.rows, StreamedRows)
    assert isinstance(data.train_dataset, StreamedExamples)
    assert len(data.dataset) == 30
    assert any("first 30 rows of the stream" in line for line in told)
    assert data.fingerprint() == data.rows.fingerprint()
    done = run_training(config, quiet=True)
    assert done.results["dataset_fingerprint"] == data.fingerprint()
    assert done.results["train_tokens"] > 0


def test_a_stream_of_texts_with_labels_must_name_them(describe, tmp_path):
    name = write(tmp_path / "a.jsonl", [{"text": "a", "label": "b"}] * 4)
    with pytest.raises(DataError, match="give dataset_label_names"):
        read_data(describe(name, dataset_streaming=True), print)
    named = describe(name, dataset_streaming=True, dataset_label_names=["a", "b"])
    assert len(read_data(named, print).dataset) == 4


def test_long_work_is_told_and_a_progress_is_taken_in_place_of_words(describe, tmp_path, monkeypatch):
    monkeypatch.setattr(rundata, "SECONDS", 0.0)
    name = write(tmp_path / "a.jsonl", asked(300))
    told: list[str] = []
    read_data(describe(name), told.append)
    assert "tokenized 300 rows of 300" in told
    told.clear()
    seen: list[tuple[int, int | None]] = []
    read_data(describe(name), told.append, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (300, 300)
    assert not any("tokenized" in line for line in told)
