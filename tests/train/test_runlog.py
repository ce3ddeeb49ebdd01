"""``log.jsonl``: a line a log, none twice after a resume, and trackers that are missed before anything loads."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tinychat import tiny_model, tiny_tokenizer

from deltaw import LoraConfig, SFTConfig, SFTTrainer
from deltaw.errors import ConfigError
from deltaw.train import runlog
from deltaw.train.runlog import LOG_NAME, RunLog, read_log, require_trackers

ROWS = [{"prompt": f"say {i}: ", "completion": "ab" * (1 + i % 3)} for i in range(8)]


def trainer_of(where: Path, **values: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(where), "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True,
    }  # fmt: skip
    return SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(**{**settings, **values}),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )


def lines(where: Path) -> list[dict[str, Any]]:
    """Strictly: each line is JSON, as other languages read it."""
    text = (where / LOG_NAME).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]


def test_every_log_is_a_line_and_a_resumed_run_has_each_once(tmp_path: Path) -> None:
    trainer_of(tmp_path, eval_strategy="steps", eval_steps=3).train()
    first = lines(tmp_path)
    assert [entry["step"] for entry in first if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in first if "eval_loss" in entry] == [3, 6]
    assert {"time", "grad_norm", "learning_rate", "epoch"} <= first[0].keys()
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    again = trainer_of(tmp_path, eval_strategy="steps", eval_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    second = lines(tmp_path)
    assert [entry["step"] for entry in second if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["loss"] for entry in second if "loss" in entry] == [e["loss"] for e in first if "loss" in e]
    assert [entry["step"] for entry in second if "eval_loss" in entry] == [3, 6]
    trainer_of(tmp_path, max_steps=1, save_strategy="no").train()  # a new run, a new log
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 1]


class _State(SimpleNamespace):
    is_world_process_zero = True
    global_step = 0


def begun(where: Path, **state: Any) -> tuple[RunLog, Any]:
    writer, now = RunLog(), _State(**state)
    writer.on_train_begin(SimpleNamespace(output_dir=str(where)), now, None)
    return writer, now


def test_numbers_that_are_not_finite_are_words(tmp_path: Path) -> None:
    writer, state = begun(tmp_path)
    writer.on_log(None, state, None, logs={"loss": math.nan, "grad_norm": math.inf, "other": -math.inf})
    (entry,) = lines(tmp_path)
    assert (entry["loss"], entry["grad_norm"], entry["other"]) == ("nan", "inf", "-inf")
    (read,) = read_log(tmp_path / LOG_NAME)
    assert math.isnan(read["loss"])
    assert read["grad_norm"] == math.inf


def test_each_line_is_there_at_once(tmp_path: Path) -> None:
    writer, state = begun(tmp_path)
    for state.global_step in (1, 2):
        writer.on_log(None, state, None, logs={"loss": 1.0})
        assert len(lines(tmp_path)) == state.global_step


def test_a_log_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer, state = begun(tmp_path)
    (tmp_path / LOG_NAME).unlink()
    (tmp_path / LOG_NAME).mkdir()
    with caplog.at_level(logging.WARNING, "deltaw"):
        for _ in range(3):
            writer.on_log(None, state, None, logs={"loss": 1.0})
    assert len(caplog.records) == 1
    assert "the run goes on without it" in caplog.text


def test_only_one_process_writes(tmp_path: Path) -> None:
    writer, state = begun(tmp_path, is_world_process_zero=False)
    writer.on_log(None, state, None, logs={"loss": 1.0})
    assert not (tmp_path / LOG_NAME).exists()


def test_missing_trackers_are_named_with_their_install(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {name: (lambda: False, package) for name, (_, package) in runlog._TRACKERS.items()}
    monkeypatch.setattr(runlog, "_TRACKERS", absent)
    for name, package in (
        ("tensorboard", "tensorboard"),
        ("trackio", "trackio"),
        ("wandb", "wandb"),
        ("mlflow", "mlflow"),
    ):
        with pytest.raises(ConfigError, match=f"report_to: '{name}' needs .*: pip install {package}"):
            require_trackers(name)
        with pytest.raises(ConfigError, match=f"pip install {package}"):
            SFTConfig(output_dir="x", report_to=name)
    with pytest.raises(
        ConfigError, match=r"(?s)'tensorbord' is no tracker; did you mean 'tensorboard'.*pip install wandb"
    ):
        require_trackers(["tensorbord", "wandb"])
    assert require_trackers("none") == require_trackers(None) == require_trackers("all") == []


def test_a_tracker_of_transformers_is_given_every_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's callback, over a writer that only counts: that the Trainer's own way works with ours."""
    told: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, **kwargs: Any) -> None: ...

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    package = ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.setitem(runlog._TRACKERS, "tensorboard", (lambda: True, "tensorboard"))
    trainer_of(tmp_path, report_to="tensorboard", max_steps=2, save_strategy="no").train()
    assert [step for name, _, step in told if name == "train/loss"] == [1, 2]
