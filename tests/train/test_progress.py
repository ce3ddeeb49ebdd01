"""What a person sees: a bar on a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

import builtins
import io
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from deltaw.train import progress
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
        callback.on_log(args, state, control, logs={"loss": 2.0 / step})
    callback.on_log(args, state, control, logs={"eval_loss": 0.25})
    callback.on_log(args, state, control, logs={"train_runtime": 1.0})
    callback.on_train_end(args, state, control)
    return callback.stream.getvalue()


def test_lines_where_there_is_no_terminal(args):
    lines = run(ProgressCallback(io.StringIO()), args, tokens=1000).splitlines()
    assert lines[0] == "training: 4 steps, from step 0"
    assert lines[1].startswith("step 1/4  loss 2.0000  ")
    assert "tok/s" in lines[1]
    assert "GiB" in lines[1]
    assert lines[1].endswith("left")
    assert lines[4].startswith("step 4/4  loss 0.5000")
    assert lines[5] == "step 4/4  eval loss 0.2500"
    assert len(lines) == 6


def test_a_bar_on_a_terminal(args):
    drawn = run(ProgressCallback(Terminal()), args)
    assert "4/4" in drawn
    assert "loss 0.5000" in drawn
    assert "eval loss 0.2500" in drawn
    assert "\x1b[?25h" in drawn  # the cursor is given back


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
