"""The demo from end to end, with a tiny random model: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from tinychat import tiny_model, tiny_tokenizer
from transformers import get_linear_schedule_with_warmup

import deltaw
from deltaw.errors import ConfigError, MissingExtra
from deltaw.evaluate import Score
from deltaw.merge import MergeReport
from text_to_sql import demo
from text_to_sql.build import TEST_SPLITS
from text_to_sql.demo_beside import Beside
from text_to_sql.demo_show import SPLIT_NAMES, Show, clock, pick_examples, printable, rows_text
from text_to_sql.demo_steps import Merged, tally
from text_to_sql.demo_training import WithinTime, train
from text_to_sql.score import Outcome

STEPS, QUESTIONS = 2, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(window=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory) -> demo.Settings:
    recipe = {**demo.RECIPE, "max_steps": STEPS, "per_device_train_batch_size": 2}
    output = tmp_path_factory.mktemp("runs") / "de mo"  # a blank, as in many a home folder
    return demo.Settings(model=str(tiny), recipe=recipe, questions=QUESTIONS, before=1, train_rows=8, output=output)


@pytest.fixture(scope="module")
def told(settings) -> tuple[str, dict]:
    """What one run printed at 80 columns, and what it found."""
    screen = io.StringIO()
    facts = demo.run(settings, Show(console=Console(file=screen, width=80, highlight=False)))
    return screen.getvalue(), facts


def words(text: str) -> str:
    return " ".join(text.split())


def test_it_prints_everything_a_newcomer_is_promised(told, settings):
    text, _ = told
    flat = words(text)
    for chapter in ("1 The model", "2 Before training", "3 Training", "4 Saved", "5 After training", "6 Merged"):
        assert chapter in flat, chapter
    assert "0 of 4 questions right" in flat  # accuracy before, on each split
    for name in SPLIT_NAMES.values():
        assert re.search(rf"{name} +\d+% +\d+% +\d+% +\d+% to \d+%", text), name
    assert "step 1/2 loss" in flat  # progress, in lines as this is no terminal
    assert re.search(r"trainable params: [\d,]+ \|\| all params: [\d,]+ \|\| trainable%: [\d.]+", flat)
    assert "bit for bit the trained model" in flat
    assert re.search(r"the adapter takes [\d.]+ MB, the base [\d.]+ MB: \d+ times as much", flat)
    assert text.count("✓") + text.count("✗") == 4
    assert "logits differ by" in flat
    for place in ("adapter", "report.html", "results.json"):
        assert str(settings.output / place) in text
    assert max(cell_len(line) for line in text.splitlines() if str(settings.output) not in line) <= 80


def test_the_chat_command_can_be_run_as_it_is_printed(told, settings):
    line = next(line for line in told[0].splitlines() if " chat --adapter " in line)
    program, verb, *rest = shlex.split(line)
    assert Path(program).name == "deltaw"
    assert verb == "chat"
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    assert (Path(given["--adapter"]) / "adapter_config.json").is_file()
    assert given["--system"].startswith("Write one SQLite query. Table ")
    assert given["--system"].endswith(")")


def test_results_hold_every_number(told, settings):
    facts = json.loads((settings.output / "results.json").read_text())
    assert facts == json.loads(json.dumps(told[1]))  # no NaN, nothing that is no plain value
    for when, total in (("baseline", QUESTIONS), ("before", 1), ("after", QUESTIONS)):
        assert list(facts[when]) == list(TEST_SPLITS)
        assert all(one["total"] == total and one["low"] <= one["value"] <= one["high"] for one in facts[when].values())
    assert [entry["step"] for entry in facts["log"]] == [1, 2]
    assert facts["steps"] == STEPS
    assert facts["stopped_by_the_clock_at"] is None
    assert facts["merged"]["together"]["total"] == QUESTIONS
    assert facts["sizes"]["adapter"] > 0
    assert facts["sizes"]["base"] > 0
    assert set(facts["seconds"]) >= {"asking before", "training", "asking after", "merging"}
    assert [one["split"] for one in facts["examples"]] == list(TEST_SPLITS)


def test_the_report_is_one_file_with_both_charts(told, settings):
    page = (settings.output / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    for name in SPLIT_NAMES.values():
        assert name in page
    assert all(key.replace("_", " ") in page for key in demo.RECIPE)


def test_the_saved_adapter_loads_and_names_its_base(told, settings, tiny):
    folder = settings.output / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)
    model = deltaw.PeftModel.from_pretrained(deltaw.load_model(tiny), str(folder))
    assert model.active_adapters == ["default"]
    assert deltaw.load_tokenizer(folder).chat_template == tiny_tokenizer().chat_template


# --- in 4 bits ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(settings, told, tmp_path_factory) -> tuple[str, dict, demo.Settings]:
    """The same run over a base in 4 bits, beside the one in full: what it printed, what it found."""
    changed = dataclasses.replace(
        settings,
        recipe=settings.recipe | {"optim": "paged_adamw_8bit"},
        load_in_4bit=True,
        output=tmp_path_factory.mktemp("qlora"),
        beside=settings.output / "results.json",
    )
    screen = io.StringIO()
    facts = demo.run(changed, Show(console=Console(file=screen, width=80, highlight=False)))
    return screen.getvalue(), facts, changed


def test_in_4_bits_it_stands_beside_the_run_in_16(four, told):
    text, facts, changed = four
    flat, other = words(text), told[1]
    assert "QLoRA, rank 16" in flat
    assert "7 Beside 16 bits" in flat
    assert facts["memory"]["weights"] < other["memory"]["weights"]
    for run in (facts, other):
        assert run["memory"]["training"] > run["memory"]["weights"]
        assert f"{run['memory']['weights'] / 1e6:,.1f} MB" in flat
        assert f"{run['memory']['training'] / 1e6:,.1f} MB" in flat
    assert "bit for bit the trained model" in flat  # on a base that was quantized anew
    assert "merged into 4 bits again" in flat
    page = (changed.output / "report.html").read_text()
    assert "Beside 16 bits" in page
    assert "paged_adamw_8bit" in page


def test_only_like_runs_are_compared(four, tmp_path):
    _, facts, _ = four
    assert "`make demo` makes one" in Beside.read(tmp_path / "none.json", facts).why
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**facts, "seed": 99, "load_in_4bit": False}))
    assert "another seed" in Beside.read(path, facts).why
    path.write_text(json.dumps(facts))
    assert "another load_in_4bit" in Beside.read(path, facts).why


# --- time -----------------------------------------------------------------------------------------------------


def test_training_stops_when_its_time_is_up(settings, tiny, tmp_path):
    rows = [{"prompt": f"say {n}", "completion": f"{n}!"} for n in range(16)]
    recipe = {**settings.recipe, "max_steps": 50}
    learned = train(
        tiny_model(),
        tiny_tokenizer(),
        rows,
        recipe,
        base="tiny",
        seed=0,
        seconds=1e-9,
        output=tmp_path,
        stream=io.StringIO(),
        quiet=True,
    )
    assert learned.stopped == 1
    assert len(learned.log) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"log.jsonl"}  # training itself leaves nothing else behind


def test_a_run_that_fits_has_the_linear_schedule():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (linear,) = get_linear_schedule_with_warmup(optimizer, 6, 40).lr_lambdas
    ours = [WithinTime(100.0).factor(step, 40, 6, spent=step * 2.0) for step in range(41)]
    assert ours == pytest.approx([linear(step) for step in range(41)])


@pytest.mark.parametrize("pace", [3.0, 5.0, 9.0])
def test_a_run_that_is_too_slow_still_ends_with_a_small_learning_rate(pace):
    clock, seconds, steps = WithinTime(100.0), 100.0, 40
    last = int(seconds / pace)  # the steps that there is time for
    rates = [clock.factor(step, steps, 6, spent=step * pace) for step in range(last)]
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[-1] <= 1.5 / (last - 6)
    assert min(rates[1:]) > 0


# --- small things -------------------------------------------------------------------------------------------


def outcomes(*kinds_and_status: tuple[str, str]) -> tuple[Outcome, ...]:
    return tuple(Outcome(status, kind, "select 1", "select 2", [(1,)]) for kind, status in kinds_and_status)


def questions(found: dict[str, tuple[Outcome, ...]]) -> dict[str, list[dict]]:
    return {split: [{"prompt": [{"content": f"{split} {n}"}]} for n in range(len(o))] for split, o in found.items()}


def test_examples_are_of_mixed_kinds_with_one_failure():
    found = {
        "seen": outcomes(("count", "correct"), ("top", "wrong")),
        "wording": outcomes(("count", "correct"), ("group", "correct")),
        "table": outcomes(("count", "correct"), ("filter", "invalid")),
        "both": outcomes(("count", "correct"), ("top", "correct")),
    }
    picked = pick_examples(questions(found), found)
    assert [one.split for one in picked] == list(found)
    assert [one.right for one in picked] == [True, True, False, True]  # the hardest split that has one
    assert len({one.kind for one in picked}) == 4


def test_examples_of_a_faultless_model_are_all_right():
    found = {split: outcomes(("count", "correct"), ("top", "correct")) for split in TEST_SPLITS}
    assert all(one.right for one in pick_examples(questions(found), found))


@pytest.mark.parametrize(
    ("right", "total", "holds", "verdict"),
    [
        ((90, 90), 100, True, "no difference"),
        ((90, 89), 100, True, "-1.0 points"),
        ((90, 92), 100, False, "+2.0 points"),
        ((270, 267), 300, True, "-1.0 points"),
        ((270, 266), 300, False, "-1.3 points"),
        ((3, 4), 8, True, "one question"),
    ],
)
def test_a_merge_holds_within_a_point(right, total, holds, verdict):
    apart, together = (Score("s", one, total) for one in right)
    merged = Merged(MergeReport(1, 0, 0, 1, 1, 0), "wording", apart, together, [])
    assert merged.holds is holds
    assert merged.verdict.startswith(verdict)


def test_tally_counts_what_is_correct():
    score = tally({"seen": outcomes(("top", "correct"), ("top", "wrong"), ("top", "invalid"))})["seen"]
    assert (score.right, score.total) == (1, 3)


def test_what_a_model_writes_cannot_reach_the_terminal():
    assert printable("select\n 1\x1b[2J\x07") == "select 1�[2J�"
    assert rows_text([]) == "no rows"
    assert rows_text([("a", 1.23456789)]) == "a | 1.23457"
    assert rows_text([(n,) for n in range(5)]) == "5 rows: 0, 1, 2, ..."
    assert rows_text([], "running 'x': no such column: y") == "did not run: y"
    assert [clock(s) for s in (3.2, 59.6, 125)] == ["3 s", "1:00 min", "2:05 min"]


def test_the_command_line():
    settings, quiet = demo.parse(["--full", "--steps", "5", "--quiet"])
    assert (settings.questions, settings.recipe["max_steps"], quiet) == (300, 5, True)
    assert demo.parse([])[0] == demo.Settings()
    assert demo.parse(["--full", "--questions", "7"])[0].questions == 7
    for wrong in (["--questions", "301"], ["--questions", "0"], ["--steps", "0"]):
        with pytest.raises(SystemExit):
            demo.parse(wrong)


def test_mistakes_are_told_shortly_and_early(tmp_path, capsys, monkeypatch, settings):
    (tmp_path / "file").write_text("")
    assert demo.main(["--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"error: --output {tmp_path / 'file'} is a file: name a folder\n"
    with pytest.raises(ConfigError, match="cannot be made"):
        demo.run(dataclasses.replace(settings, output=tmp_path / "file" / "below"), Show(quiet=True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="matplotlib"):
        demo.run(settings, Show(quiet=True))


def test_a_model_that_is_not_there_is_an_error_without_a_trace(tmp_path, capsys):
    arguments = ["--model", "./nowhere", "--questions", "1", "--output", str(tmp_path), "--quiet"]
    assert demo.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: model folder './nowhere' does not exist")
