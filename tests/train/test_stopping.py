"""When a run ends by itself, and what is said of a loss that rises."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluated import trainer_of

from deltaw import SFTConfig
from deltaw.errors import ConfigError
from deltaw.train.stopping import RisingLoss


def test_early_stopping_keeps_the_best_and_goes_on_counting_after_a_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 30,
        "early_stopping_patience": 3, "early_stopping_threshold": 10.0, "learning_rate": 1e-4,
    }  # fmt: skip
    trainer = trainer_of(tmp_path, **values)
    assert trainer.args.load_best_model_at_end
    with caplog.at_level(logging.WARNING, "deltaw"):
        trainer.train()
    assert trainer.state.global_step == 4  # the first has nothing to be compared with; then three without 10 less
    assert "early_stopping_patience" in caplog.text
    again = trainer_of(tmp_path, **values)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 4


def test_early_stopping_of_a_run_that_cannot_keep_the_best_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is evaluated"):
        SFTConfig(output_dir=str(tmp_path), early_stopping_patience=2)
    with pytest.raises(ConfigError, match="give both the same value"):
        SFTConfig(output_dir=str(tmp_path), early_stopping_patience=2, eval_strategy="epoch", save_strategy="steps")


def said(losses: list[float], caplog: pytest.LogCaptureFixture, *, best: bool = False, each: int = 10) -> list[str]:
    """Warnings of a run that is evaluated twice an epoch."""
    callback, history = RisingLoss(), []
    args = SimpleNamespace(load_best_model_at_end=best)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "deltaw"):
        for n, loss in enumerate(losses, 1):
            history.append({"eval_loss": loss, "step": n * each, "epoch": n / 2})
            state: Any = SimpleNamespace(log_history=history, global_step=n * each, epoch=n / 2)
            callback.on_evaluate(args, state, None)  # type: ignore[arg-type]
    return [record.getMessage() for record in caplog.records]


def test_a_rising_loss_is_told_once_from_the_second_epoch_on(caplog: pytest.LogCaptureFixture) -> None:
    (told,) = said([2.0, 1.5, 1.4, 1.6, 1.9], caplog)
    assert told.startswith("step 40, epoch 2.0: eval_loss rose to 1.6000, it was 1.4000 at step 30")
    assert "early_stopping_patience" in told
    (told,) = said([2.0, 1.5, 1.4, 1.6], caplog, best=True)
    assert "the best adapter is kept" in told
    assert said([2.0, 2.5], caplog) == []  # the first epoch
    assert said([2.0, 1.5, 1.4, 1.41], caplog) == []  # noise
    assert said([2.0, 1.5, 1.4, 1.3], caplog) == []
