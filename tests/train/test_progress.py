"""What a person sees: a bar on a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

import builtins
import io
import logging
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from deltaw.train import progress
from deltaw.train.evaluation import Answer
from deltaw.train.progress import ProgressCallback, _clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def run(callback: ProgressCallback, args, tokens: int = 0) -> str:
    state, control = TrainerState(max_steps=4), TrainerControl()
    callback.on_train_begin(args, state, control)
    for step in range(1, 5):
        state.global_step = step
        state.num_input_tokens_seen = step * tokens
        callback.on_step_end(args, state, control)
        callback.on_log(args, state, control, logs={"loss": 2.0 / step, "grad_norm": 0.5})
    callback.on_answers(state, [Answer("how many?", "4", "5")])
    callback.on_log(args, state, control, logs={"eval_loss": 0.25, "eval_perplexity": 1.284, "eval_exact_match": 0.5})
    callback.on_log(args, state, control, logs={"train_runtime": 1.0})
    callback.on_train_end(args, state, control)
    return callback.stream.getvalue()


def test_lines_where_there_is_no_terminal(args):
    lines = run(ProgressCallback(io.StringIO()), args, tokens=1000).splitlines()
    assert lines[0] == "training: 4 steps, from step 0"
    assert lines[1].startswith("step 1/4  loss 2.0000  ")
    assert "tok/s" in lines[1]
    assert "grad 0.50" in lines[1]
    assert "GiB" in lines[1]
    assert lines[1].endswith("left")
    assert lines[4].startswith("step 4/4  loss 0.5000")
    assert lines[5] == "step 4/4  eval loss 0.2500  perplexity 1.284  answers right 50.0%"
    assert lines[6] == "  'how many?' -> '4'  (expected '5')"
    assert len(lines) == 7


def test_a_bar_on_a_terminal(args):
    drawn = run(ProgressCallback(Terminal()), args)
    assert "4/4" in drawn
    assert "loss 0.5000" in drawn
    assert "eval loss 0.2500" in drawn
    assert "'how many?' -> '4'" in drawn
    assert "\x1b[?25h" in drawn  # the cursor is given back


def test_what_others_say_goes_above_the_bar_and_stays(args):
    """Warnings, prints and log records, of handlers that were made before the bar too."""
    terminal, before = Terminal(), sys.stderr
    sys.stderr = terminal
    handler = logging.StreamHandler()  # holds this stream for good
    logger = logging.getLogger("somebody")
    logger.addHandler(handler)
    try:
        callback, state = ProgressCallback(), TrainerState(max_steps=4, global_step=1)
        callback.on_train_begin(args, state, TrainerControl())
        callback.on_log(args, state, TrainerControl(), logs={"loss": 1.5})
        logger.warning("a record [bold]with marks[/]")
        sys.stderr.write(warnings.formatwarning("a warning", UserWarning, "file.py", 1))  # as Python shows them
        print("a print", file=sys.stderr)
        assert handler.stream is not terminal
        callback.on_train_end(args, state, TrainerControl())
        assert handler.stream is terminal
        assert sys.stderr is terminal
        logger.warning("afterwards")
    finally:
        logger.removeHandler(handler)
        sys.stderr = before
    shown = screen(terminal.getvalue(), 80)
    for text in ("a record [bold]with marks[/]", "a warning", "a print"):
        assert sum(text in line and "loss" not in line for line in shown) >= 1, shown
    bars = [i for i, line in enumerate(shown) if "loss 1.5000" in line]
    assert bars == [len(shown) - 2]  # one bar, under them all
    assert shown[-1] == "afterwards"


def screen(text: str, width: int) -> list[str]:
    """What a terminal shows of ``text``, line by line, as far as rich moves about in it."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            row = max(0, row - int(part[2:-1] or 1))
        elif part == "\x1b[2K":
            rows[row] = ""
        elif not part.startswith("\x1b"):
            assert len(part) <= width
            rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in rows if line.strip()]


def test_skipped_steps_are_shown(args):
    callback, state = ProgressCallback(io.StringIO()), TrainerState(max_steps=4, global_step=2)
    callback.on_train_begin(args, state, TrainerControl())
    callback.on_log(args, state, TrainerControl(), logs={"loss": float("nan"), "nonfinite_steps": 2})
    assert "loss nan" in callback.stream.getvalue()
    assert "2 skipped" in callback.stream.getvalue()


@pytest.mark.parametrize("width", [80, 60])
def test_a_narrow_terminal_keeps_the_bar_on_one_line(args, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(progress, "_memory", lambda: "12.3 GiB")
    callback, state = ProgressCallback(Terminal()), TrainerState(max_steps=12345, global_step=123)
    callback.on_train_begin(args, state, TrainerControl())
    logs = {"loss": 1.5, "grad_norm": 0.5, "tokens_per_second": 12345.0}
    callback.on_log(args, state, TrainerControl(), logs=logs)
    callback.on_train_end(args, state, TrainerControl())
    (line,) = screen(callback.stream.getvalue(), width)
    assert "loss 1.5000" in line


def test_a_step_costs_next_to_nothing(args):
    callback, state = ProgressCallback(Terminal()), TrainerState(max_steps=10**6)
    callback.on_train_begin(args, state, TrainerControl())
    best = 1.0
    for _ in range(10):
        begun = time.perf_counter()
        for state.global_step in range(200):
            callback.on_step_end(args, state, TrainerControl())
        best = min(best, (time.perf_counter() - begun) / 200)
    callback.close()
    assert best < 2e-4  # of a step of 100 ms: 0.2%


def test_quiet_is_quiet(args):
    assert run(ProgressCallback(Terminal(), quiet=True), args) == ""


def test_without_rich_lines_say_the_same(args, monkeypatch):
    real = builtins.__import__

    def without_rich(name, *rest, **kwargs):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    assert "step 4/4  loss 0.5000" in run(ProgressCallback(Terminal()), args)


def test_the_rate_of_a_log_wins_and_an_interrupted_bar_can_be_closed(args):
    callback = ProgressCallback(Terminal())
    state, control = TrainerState(max_steps=4), TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_log(args, state, control, logs={"loss": 1.0, "tokens_per_second": 1234.0})
    assert "1,234 tok/s" in callback._facts()
    callback.close()
    callback.close()


def test_rich_is_not_imported_with_the_module():
    lines = Path(progress.__file__).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith(("import rich", "from rich"))]


def test_clock():
    assert [_clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
