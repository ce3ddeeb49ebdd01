"""``deltaw check`` as a person calls it: exit codes, masks, findings and cures, the page, JSON, what is allowed."""

import json

import pytest
from commandline import run
from rich.console import Console
from rich.text import Text
from tinychat import save_tiny

from deltaw.cli.check import _bars, _masked


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def describe(base, tmp_path):
    """Writes rows and a run of them; gives the run's file."""

    def write(rows, **keys):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = {"model_name_or_path": base, "dataset_name": tmp_path / "rows.jsonl", "dataset_cache": "false"}
        lines |= {"output_dir": tmp_path / "out", "num_train_epochs": 1, "per_device_train_batch_size": 2, **keys}
        file = tmp_path / "run.yaml"
        file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        return file

    return write


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


GOOD = [chat(f"say {i}", f"{i}!") for i in range(40)]


def test_good_data_is_shown_with_its_masks(capsys, describe, tmp_path):
    code, out, _ = run(capsys, "check", describe(GOOD))
    assert code == 0
    assert "examples      40" in out
    assert "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n[[0!<|im_end|>]]" in out
    assert "good: nothing stops this run" in out
    assert not (tmp_path / "out").exists()  # looking leaves nothing behind


def test_an_error_stops_with_1_names_rows_and_cure_and_can_be_allowed(capsys, describe, tmp_path):
    file = describe([*GOOD, chat("say", "x" * 200)], max_length=60)
    code, out, _ = run(capsys, "check", file)
    assert code == 1
    out = " ".join(out.split())
    assert "error truncated-answer" in out
    assert f"{tmp_path / 'rows.jsonl'}:41" in out.replace(" ", "").replace("(", "")
    assert "cure: raise max_length" in out
    assert "1 error stops this run; if it is meant: --allow truncated-answer" in out
    code, out, _ = run(capsys, "check", file, "--allow", "truncated-answer")
    assert code == 0
    assert "allowed truncated-answer" in " ".join(out.split())
    # the keys of a run are flags here too
    assert run(capsys, "check", file, "--max-length", "512")[0] == 0
    assert run(capsys, "check", file, "--overlong=drop")[0] == 0


def test_train_refuses_what_check_finds(capsys, describe, tmp_path):
    file = describe([*GOOD, chat("say", "x" * 200)], max_length=60, max_steps=3)
    code, _, err = run(capsys, "train", file)
    assert code == 2
    assert "[truncated-answer]" in err
    assert "--allow truncated-answer" in err
    assert not (tmp_path / "out").exists()
    assert run(capsys, "train", file, "--allow", "truncated-answer", "--quiet")[0] == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    kept = json.loads((tmp_path / "out" / "all_results.json").read_text())["data"]
    assert kept["truncated_supervised"] == 1
    assert "truncated-answer" in {finding["name"] for finding in kept["findings"]}


def test_an_unknown_name_is_an_error_before_anything_is_read(capsys, describe):
    code, _, err = run(capsys, "check", describe(GOOD), "--allow", "truncated-answers")
    assert code == 2
    assert "did you mean 'truncated-answer'" in " ".join(err.split())


def test_json_holds_counts_findings_and_examples(capsys, describe):
    code, out, _ = run(capsys, "check", describe([*GOOD, *GOOD]), "--json")
    result = json.loads(out)
    assert code == 0
    assert result["ok"] is True
    assert result["data"]["duplicates"] == 40
    repeated = next(finding for finding in result["data"]["findings"] if finding["name"] == "duplicates")
    assert repeated["level"] == "warning"
    assert repeated["count"] == 40
    assert result["examples"][0]["pieces"][-2] == ["0!", True, False]
    code, out, _ = run(capsys, "check", describe([chat("say", "")], val_size=0.0, max_length=8), "--json")
    assert code == 1
    assert json.loads(out)["stops"] == ["answer-cut-away"]


def test_rows_that_cannot_be_rendered_are_the_same_verdict(capsys, describe):
    file = describe([*GOOD, {"messages": [{"role": "robot", "content": "x"}]}])
    code, out, _ = run(capsys, "check", file)
    assert code == 1
    assert "robot" in out
    code, out, _ = run(capsys, "check", file, "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False
    assert "robot" in json.loads(out)["error"]


def test_the_page_stands_alone_and_escapes_what_rows_say(capsys, describe, tmp_path):
    page = tmp_path / "deep" / "check.html"
    rows = [chat("<script>alert(1)</script>", "no <|im_end|>"), *GOOD]
    code, out, _ = run(capsys, "check", describe(rows), f"--html={page}")
    assert code == 0
    assert str(page) in out.replace("\n", "")
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "<mark>0!</mark><mark><b>&lt;|im_end|&gt;</b></mark>" in text
    assert "control-tokens" in text
    assert "<svg" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_a_terminal_gets_colours_and_obeys_no_row():
    pieces = [_piece("ask\x1b[31m\x9b", False), _piece("yes", True), _piece("<end>", True, True)]
    console = Console(force_terminal=True, color_system="standard", width=80)
    with console.capture() as captured:
        console.print(_masked(pieces, True))
    shown = captured.get()
    assert "\x1b[1;32myes" in shown
    assert "\x1b[31m" not in shown
    assert "\x9b" not in shown
    assert _masked(pieces, False).plain == "ask\u241b[31m\ufffd[[yes<end>]]"
    assert isinstance(_masked([], False), Text)


def _piece(*words):
    from deltaw.data.check_preview import Piece

    return Piece(*words)


def test_a_histogram_in_a_few_lines():
    lines = _bars([(i, i, 2 * i) for i in range(20)])
    assert len(lines) == 7
    assert lines[0].startswith(" 0 to  2 ")
    assert lines[-1].endswith("█" * 21 + "▍ 74") or "74" in lines[-1]
    assert _bars([]) == []
    assert _bars([(5, 5, 3)]) == ["5 to 5 " + "█" * 32 + " 3"]
