"""``deltaw merge`` of a run whose base was in 4 bits: the three ways, their drifts, and which one is written."""

from __future__ import annotations

import json

import pytest
from commandline import run
from tinychat import save_tiny, write_rows

from deltaw.cli import main
from deltaw.loading import load_model
from deltaw.quant import NF4Config, NF4Linear


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    save_tiny(folder / "base")
    write_rows(folder / "rows.jsonl")
    (folder / "run.yaml").write_text(
        f"model_name_or_path: {folder / 'base'}\ndataset_name: {folder / 'rows.jsonl'}\nload_in_4bit: true\n"
        f"output_dir: {folder / 'adapter'}\nmax_steps: 3\nlearning_rate: 1e-2\nwarmup_steps: 0\n"
        "r: 4\nlora_dropout: 0\nlogging_steps: 1\nuse_cpu: true\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["train", str(folder / "run.yaml"), "--quiet"])
    assert not left.value.code
    return folder


def packed(path) -> int:
    return sum(isinstance(module, NF4Linear) for module in load_model(path).modules())


@pytest.mark.parametrize(
    ("into", "is_packed"), [(None, False), ("full", False), ("dequantized", False), ("4bit", True)]
)
def test_what_is_written_and_what_is_told(capsys, folder, into, is_packed):
    output = folder / f"merged-{into}"
    asked = [] if into is None else ["--into", into]
    code, out, _ = run(capsys, "merge", "--adapter", folder / "adapter", "--output", output, "--json", *asked)
    assert code == 0
    told = json.loads(out)
    assert told["into"] == (into or "dequantized")
    ways = told["drifts"]
    assert ways.keys() == {"dequantized", "4bit", *asked[1:]}
    assert told["drift"] == ways[told["into"]]
    assert told["better"] == min(ways, key=lambda way: ways[way]["kl"])
    assert told["better"] == "dequantized"  # the values that were trained beside: nothing is lost
    assert ways["dequantized"]["max_abs"] < 1e-3
    assert 0 < told["rounding"]["mean"] <= told["rounding"]["worst"] < 0.3
    assert bool(packed(output)) == is_packed


def test_a_person_reads_the_better_one(capsys, folder):
    code, out, _ = run(capsys, "merge", "--adapter", folder / "adapter", "--output", folder / "told")
    assert code == 0
    assert "dequantized (written)" in out
    assert "4bit (not written)" in out
    assert "better: " in out


def test_a_base_whose_files_are_packed_has_no_full_precision(capsys, folder):
    whole = load_model(folder / "base", quantization_config=NF4Config(bnb_4bit_use_double_quant=True))
    whole.save_pretrained(folder / "packed")
    words = ["merge", "--adapter", folder / "adapter", "--model", folder / "packed"]
    code, _, err = run(capsys, *words, "--output", folder / "refused", "--into", "full")
    assert code
    assert "full precision" in err
    assert not (folder / "refused").exists()
    code, out, _ = run(capsys, *words, "--output", folder / "kept", "--json")
    assert code == 0
    assert json.loads(out)["into"] == "dequantized"
    assert not packed(folder / "kept")


def test_a_plain_run_has_one_way(capsys, folder, tmp_path):
    words = ["train", folder / "run.yaml", "--load_in_4bit", "false", "--output_dir", tmp_path / "adapter", "--quiet"]
    assert run(capsys, *words)[0] == 0
    words = ["merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    code, _, err = run(capsys, *words, "--into", "4bit")
    assert code
    assert "not in 4 bits" in err
    code, out, _ = run(capsys, *words, "--json")
    assert code == 0
    assert "drifts" not in json.loads(out)


@pytest.mark.parametrize(
    ("four", "into", "cure"),
    [("true", "4bit", "--into dequantized"), ("true", "dequantized", "--dtype float32"), ("false", None, "--dtype")],
)
def test_a_merge_that_drifts_far_says_what_to_do(capsys, folder, tmp_path, monkeypatch, four, into, cure):
    monkeypatch.setattr("deltaw.cli.merge._SAME_ENOUGH", 1.1)
    words = ["train", folder / "run.yaml", "--load_in_4bit", four, "--output_dir", tmp_path / "adapter", "--quiet"]
    assert run(capsys, *words)[0] == 0
    asked = [] if into is None else ["--into", into]
    code, _, err = run(capsys, "merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", *asked)
    assert code == 0
    assert cure in err
    assert "keep the adapter apart" in err
