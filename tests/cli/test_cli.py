"""The command line as a person meets it, without training: help, mistakes, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tinychat import save_tiny, write_rows

import deltaw.cli.common as common
from deltaw.cli import main
from deltaw.config import GROUPS, RunConfig


@pytest.fixture
def deltaw(capsys, monkeypatch):
    """Runs a command in this process; gives its exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERMINAL_WIDTH", "120")

    def run(*words: object):
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom deltaw.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "print('heavy:', heavy or None)"
    )
    took = []
    for _ in range(3):  # processor time, and the best of three: the machine may be busy with something else
        begun = os.times()
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        ended = os.times()
        took.append(ended.children_user + ended.children_system - begun.children_user - begun.children_system)
        if took[-1] < 0.5:
            break
    assert "heavy: None" in out
    for verb in ("check", "train", "eval", "generate", "chat", "merge", "methods"):
        assert f" {verb} " in out
    assert min(took) < 0.5


def test_train_help_shows_every_key_without_torch(deltaw):
    code, out, _ = deltaw("train", "--help")
    assert code == 0
    for key in RunConfig.model_fields:
        assert f"--{key.replace('_', '-')}" in out
    places = [out.index(f"─ {panel} ─") for panel in GROUPS]
    assert places == sorted(places)


@pytest.mark.parametrize("verb", ["eval", "generate", "chat", "merge"])
def test_every_verb_has_help(deltaw, verb):
    code, out, _ = deltaw(verb, "-h")
    assert code == 0
    assert "--adapter" in out


def test_version(deltaw):
    code, out, _ = deltaw("--version")
    assert code == 0
    assert out.startswith("deltaw ")


def test_mistakes_are_a_short_message_and_exit_2(deltaw, tmp_path):
    code, out, err = deltaw("train", tmp_path / "no.yaml", "--learning_rat", "1")
    assert (code, out) == (2, "")
    assert "no such file" in err
    assert "Traceback" not in err
    code, _, err = deltaw("train", "--learning-rat", "1", "--r", "0")
    assert code == 2
    for part in (
        "learning_rat = '1': unknown key; did you mean 'learning_rate'?",
        "r = '0'",
        "dataset_name: missing",
    ):
        assert part in err


def test_debug_anywhere_shows_where():
    code = "from deltaw.cli import main; main(['train', 'no.yaml', '--debug'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


def test_an_unknown_verb_or_option_is_exit_2(deltaw):
    assert deltaw("trian")[0] == 2
    assert deltaw("generate", "--adaptr", "x")[0] == 2


def test_ctrl_c_is_exit_130(deltaw, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "_require_adapter", interrupted)
    code, _, err = deltaw("generate", "--adapter", tmp_path, "--prompt", "x")
    assert code == 130
    assert "stopped" in err


def test_square_brackets_of_a_message_are_shown(deltaw):
    code, _, err = deltaw("train", "--model-name-or-path", "m", "--dataset-name", "d", "--layers-to-transform", "[x]")
    assert code == 2
    assert "layers_to_transform = '[x]'" in err


def test_an_adapter_that_is_not_there(deltaw, tmp_path):
    (tmp_path / "adapter").mkdir()
    code, _, err = deltaw("generate", "--adapter", tmp_path / "adaptr", "--prompt", "x")
    assert code == 2
    assert "did you mean 'adapter'?" in err
    (tmp_path / "adapter" / "checkpoint-3").mkdir()
    (tmp_path / "adapter" / "checkpoint-3" / "adapter_config.json").write_text("{}")
    _, _, err = deltaw("chat", "--adapter", tmp_path / "adapter")
    assert "checkpoint-3?" in err.replace("\n", "")
    assert deltaw("generate", "--prompt", "x")[2].startswith("error: nothing to load")


def test_generate_with_a_base_alone(deltaw, base):
    code, out, _ = deltaw("generate", "--model", base, "--prompt", "hi", "--max-new-tokens", 5, "--json")
    assert code == 0
    told = json.loads(out)
    assert set(told) == {"prompt", "answer", "model"}
    code, plain, _ = deltaw("generate", "--model", base, "--prompt", "hi", "--max-new-tokens", 5)
    assert plain == told["answer"] + "\n"
    _, raw, _ = deltaw("generate", "--model", base, "--prompt", "hi", "--max-new-tokens", 5, "--raw")
    assert raw != plain


def test_eval_of_a_base_with_a_metric_of_ones_own(deltaw, base, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    (tmp_path / "mine.py").write_text(
        "def any_text(predictions, rows):\n    return [bool(p) for p in predictions]\n"
        "def length(predictions, rows):\n    return {'mean': sum(map(len, predictions)) / len(rows)}\n"
    )
    code, out, _ = deltaw(
        "eval", "--model", base, "--dataset", rows, "--max-new-tokens", 4, "--limit", 3, "--json",
        "--metric", "loss", "--metric", "exact_match", "--metric", f"{tmp_path}/mine.py:any_text",
        "--metric", f"{tmp_path}/mine.py:length", "--output", tmp_path / "out" / "preds.jsonl",
    )  # fmt: skip
    assert code == 0
    told = json.loads(out)
    assert told["rows"] == 3
    assert told["base"]["tokens"] > 0
    assert told["base"]["exact_match"]["total"] == told["base"]["any_text"]["total"] == 3
    assert told["base"]["length.mean"] >= 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "preds.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"row", "reference", "base"}] * 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--metric", "los"], "unknown; did you mean 'loss'?"),
        (["--metric", "nowhere.py:f"], "no Python file"),
        (["--compare-base"], "give --adapter"),
    ],
)
def test_eval_mistakes(deltaw, base, tmp_path, words, told):
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    code, _, err = deltaw("eval", "--model", base, "--dataset", rows, *words)
    assert code == 2
    assert told in err


def test_merge_refuses_a_folder_in_use(deltaw, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    code, _, err = deltaw("merge", "--adapter", tmp_path, "--output", tmp_path / "out")
    assert code == 2
    assert "nothing was written" in err
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
