"""A resumed run is bitwise the uninterrupted one: weights, optimizer states, what it logged; wherever it stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resuming import ROWS, assert_same, lora, trainer_of
from tinychat import save_tiny
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from deltaw import AdaLoraConfig, NF4Config, SFTTrainer
from deltaw.errors import CheckpointError, ConfigError
from deltaw.train.resume import RUNNING_NAME, same_randomness


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def check_resume(folder: str, tmp_path: Path, stops: tuple[int, ...], config: Any = lora, **values: Any) -> SFTTrainer:
    straight = trainer_of(folder, tmp_path / "a", config(), save_strategy="steps", save_steps=1, **values)
    whole = straight.train()
    for stop in stops:
        again = trainer_of(folder, tmp_path / "b", config(), **values)
        torch.manual_seed(stop)  # whatever was drawn before does not matter
        parted = again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
        assert_same(straight, again)
        assert parted.training_loss == whole.training_loss
        assert parted.global_step == whole.global_step
    return straight


def test_mid_epoch_at_its_end_and_at_the_last_step(folder: str, tmp_path: Path) -> None:
    """The log line of step 3 covers steps 1 to 3, and that of 6 an epoch's end: what was not logged yet comes along."""
    check_resume(folder, tmp_path, (1, 2, 4, 5, 8))


@pytest.mark.parametrize(
    "values",
    [
        {"packing": True, "max_length": 48, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1},
        {"padding_free": True},
        {"dataloader_num_workers": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"optim": "adamw_8bit"},
        {"optim": "paged_adamw_8bit"},
        {"optim": "paged_adamw_32bit"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau"},
        {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_with(folder: str, tmp_path: Path, values: dict[str, Any]) -> None:
    steps = check_resume(folder, tmp_path, (1, 2, 3), **values).state.max_steps
    assert steps > 3


@pytest.mark.parametrize(
    "config",
    [
        lambda: AdaLoraConfig(
            init_r=6, target_r=3, tinit=1, tfinal=2, deltaT=1, total_step=8, lora_dropout=0.2,
            target_modules="all-linear", task_type="CAUSAL_LM",
        ),
        lambda: lora(init_lora_weights="pissa"),
        lambda: lora(use_dora=True, bias="lora_only", modules_to_save=["lm_head"]),
    ],
    ids=["adalora", "pissa", "dora"],
)  # fmt: skip
def test_method(folder: str, tmp_path: Path, config: Any) -> None:
    check_resume(folder, tmp_path, (2, 5), config)


def test_over_four_bits(folder: str, tmp_path: Path) -> None:
    values = {"model_init_kwargs": {"quantization_config": NF4Config(bnb_4bit_use_double_quant=True)}}
    check_resume(folder, tmp_path, (3,), optim="paged_adamw_8bit", **values)


class Stream(IterableDataset):
    """Rows that come one by one, in an order of the pass."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(random.Random(self.epoch).sample(ROWS, len(ROWS)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_in_its_first_and_second_pass(folder: str, tmp_path: Path, workers: int) -> None:
    """13 rows are three steps and a quarter a pass."""
    values = {"max_steps": 8, "rows": Stream(), "dataloader_num_workers": workers}
    check_resume(folder, tmp_path, (1, 3, 4, 7), **values)


def test_the_end_of_an_epoch_that_was_not_met_is_met(folder: str, tmp_path: Path) -> None:
    """Killed between the last step of an epoch and its evaluation: the evaluation is made by the run that goes on."""
    straight = check_resume(folder, tmp_path, (4, 8), eval_strategy="epoch", save_total_limit=None)
    assert sum("eval_loss" in entry for entry in straight.state.log_history) == 2
    assert json.loads((tmp_path / "a" / "checkpoint-4" / RUNNING_NAME).read_text())["owed"] == ["epoch_end"]


def test_weights_do_not_depend_on_evaluation(folder: str, tmp_path: Path) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for values in ({"eval_strategy": "steps", "eval_steps": 1}, {}):
        trainer: Any = trainer_of(folder, tmp_path, **values)  # which seeds
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_random_numbers_are_as_before() -> None:
    def drawn() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with same_randomness():
        before = drawn()
    assert drawn() == before != drawn()


def test_a_checkpoint_of_other_data_is_refused(folder: str, tmp_path: Path) -> None:
    trainer_of(folder, tmp_path / "a", save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    values = {"per_device_train_batch_size": 4, "seed": 1, "rows": ROWS[1:]}
    with pytest.raises(ConfigError) as caught:
        trainer_of(folder, tmp_path / "b", **values).train(resume_from_checkpoint=checkpoint)
    for told in (
        "per_device_train_batch_size: 2 in the checkpoint, 4 now",
        "seed: 42",
        "examples: ",
        "ignore_data_skip",
    ):
        assert told in str(caught.value)
    again = trainer_of(folder, tmp_path / "b", ignore_data_skip=True, max_steps=3, **values)
    assert again.train(resume_from_checkpoint=checkpoint).global_step == 3


def test_a_checkpoint_of_another_adapter_is_refused(folder: str, tmp_path: Path) -> None:
    trainer_of(folder, tmp_path / "a", save_strategy="steps", save_steps=2, max_steps=2).train()
    with pytest.raises(CheckpointError, match="lora_alpha: 8 in the checkpoint, 16 now"):
        trainer_of(folder, tmp_path / "b", lora(lora_alpha=16)).train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")
        )


def test_auto_takes_the_newest_complete_one_or_starts_anew(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "deltaw"):
        trainer_of(folder, tmp_path, save_strategy="steps", save_steps=2).train(resume_from_checkpoint="auto")
        assert "starting anew" in caplog.text
        (tmp_path / "checkpoint-8" / "optimizer.pt").write_bytes(b"cut short")
        begun: list[int] = []

        class Seen(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                begun.append(state.global_step)

        again = trainer_of(folder, tmp_path)
        again.add_callback(Seen())
        again.train(resume_from_checkpoint="auto")
    assert begun == [6, 7]
    assert f"going on from {tmp_path / 'checkpoint-6'}" in caplog.text
    assert "passed over" in caplog.text
    assert "optimizer.pt (9 bytes, not" in caplog.text


def test_the_model_alone_is_nothing_to_go_on_from(folder: str, tmp_path: Path) -> None:
    trainer_of(folder, tmp_path, save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="save_only_model"):
        trainer_of(folder, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        trainer_of(folder, tmp_path).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_found_where_the_run_was_moved_to(folder: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    trainer_of(folder, tmp_path / "a", **values).train()
    (tmp_path / "a").rename(tmp_path / "b")
    again = trainer_of(folder, tmp_path / "b", **values)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "b" / f"checkpoint-{again.state.best_global_step}")
