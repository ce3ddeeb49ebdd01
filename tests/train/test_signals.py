"""Ctrl-C and SIGTERM: the step is finished, a checkpoint written, the command that goes on printed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from resuming import assert_same, trainer_of
from tinychat import save_tiny, write_rows
from transformers import TrainerCallback

from deltaw import SFTTrainer
from deltaw.train.checkpoints import checkpoints, newest
from deltaw.train.signals import Interrupted, StopSignals, Terminated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


class Sends(TrainerCallback):
    """Signals to this process, at one event of one step."""

    def __init__(self, event: str, step: int, *signals: int) -> None:
        self.signals, self.step = list(signals), step
        setattr(self, event, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            while self.signals:
                os.kill(os.getpid(), self.signals.pop(0))


def stopped(
    folder: str, where: Path, sends: Sends, raised: type[BaseException], **values: Any
) -> tuple[SFTTrainer, Any]:
    trainer = trainer_of(folder, where, **values)
    trainer.add_callback(sends)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(raised) as caught:
        trainer.train()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    return trainer, caught.value


@pytest.mark.parametrize(
    ("number", "raised", "code"), [(signal.SIGINT, Interrupted, 130), (signal.SIGTERM, Terminated, 143)]
)
def test_mid_accumulation_the_step_is_finished_and_the_run_goes_on(
    folder: str, tmp_path: Path, number: int, raised: Any, code: int
) -> None:
    straight = trainer_of(folder, tmp_path / "a")
    straight.train()
    sends = Sends("on_substep_end", 1, number)  # one of two micro-batches of the second step is done
    _, error = stopped(folder, tmp_path / "b", sends, raised)
    assert error.exit_code == code
    assert error.checkpoint == tmp_path / "b" / "checkpoint-2" == newest(tmp_path / "b")
    again = trainer_of(folder, tmp_path / "b")
    again.train(resume_from_checkpoint="auto")
    assert_same(straight, again)


@pytest.mark.parametrize("event", ["on_step_end", "on_prediction_step", "on_epoch_end", "on_save"])
def test_wherever_it_comes_nothing_is_left_out(folder: str, tmp_path: Path, event: str) -> None:
    """Evaluation is not waited for: it is made by the run that goes on, and so is what it decides."""
    values: dict[str, Any] = {
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    straight = trainer_of(folder, tmp_path / "a", **values)
    straight.train()
    _, error = stopped(folder, tmp_path / "b", Sends(event, 4, signal.SIGTERM), Terminated, **values)
    assert error.checkpoint is not None
    again = trainer_of(folder, tmp_path / "b", **values)
    again.train(resume_from_checkpoint="auto")
    assert_same(straight, again)
    assert again.state.best_global_step == straight.state.best_global_step


def test_a_second_ctrl_c_leaves_at_once_and_harms_nothing(folder: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    sends = Sends("on_substep_end", 2, signal.SIGINT, signal.SIGINT)
    trainer, error = stopped(folder, tmp_path, sends, KeyboardInterrupt, **values)
    assert not isinstance(error, Interrupted)
    assert trainer.state.global_step == 2  # the third was not finished
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    trainer_of(folder, tmp_path, **values).train(resume_from_checkpoint=True)


def test_a_second_signal_while_a_checkpoint_is_written_leaves_the_last_one(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = SFTTrainer._save_rng_state

    def twice(trainer: SFTTrainer, output_dir: str) -> None:
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        save(trainer, output_dir)

    monkeypatch.setattr(SFTTrainer, "_save_rng_state", twice)
    trainer = trainer_of(folder, tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 143
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-1"]


def test_who_saves_the_model_alone_still_gets_a_checkpoint_to_go_on_from(folder: str, tmp_path: Path) -> None:
    _, error = stopped(folder, tmp_path, Sends("on_step_end", 2, signal.SIGTERM), Terminated, save_only_model=True)
    assert error.checkpoint == tmp_path / "checkpoint-2"


def test_after_the_last_step_it_still_counts(folder: str, tmp_path: Path) -> None:
    _, error = stopped(folder, tmp_path, Sends("on_train_end", 8, signal.SIGINT), Interrupted)
    assert error.checkpoint is None
    assert "no checkpoint" in str(error)


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    seen: list[Any] = []

    def elsewhere() -> None:
        before = signal.getsignal(signal.SIGINT)
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [True]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup has it
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# --- the command line ------------------------------------------------------------------------------------------


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "deltaw.cli", *words]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on_and_that_works(folder: str, tmp_path: Path, number: int, code: int) -> None:
    run = tmp_path / "run.yaml"
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    run.write_text(
        f"model_name_or_path: {folder}\ndataset_name: {rows}\noutput_dir: {tmp_path / 'out'}\ndataset_cache: false\n"
        "max_steps: 100000\nlogging_steps: 1\nper_device_train_batch_size: 2\nr: 2\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = command("train", str(run), "--resume-from-checkpoint", "auto", "--learning_rate", "1e-3")
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("step 3/"):
                process.send_signal(number)
        process.wait()
    told = "".join(lines)
    assert process.returncode == code, told
    assert "Traceback" not in told
    done = newest(tmp_path / "out")
    assert done is not None
    step = int(done.name.split("-")[1])
    assert step >= 3
    goes_on = re.search(r"^ +(deltaw train .*)$", told, re.M)
    assert goes_on, told
    again = shlex.split(goes_on[1])
    assert again == ["deltaw", "train", str(run), "--learning_rate", "1e-3", "--resume_from_checkpoint", "auto"]
    if number == signal.SIGINT:
        words = command(*again[1:], "--max_steps", str(step + 1))
        finished = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
        assert finished.returncode == 0, finished.stderr
        assert f"going on from {done}" in finished.stderr
        assert f"step {step + 1}/{step + 1}" in finished.stderr
