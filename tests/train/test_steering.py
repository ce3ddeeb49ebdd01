"""Methods that act on the whole model while it trains: the trainer drives them, accumulates and resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tinychat import save_tiny, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import deltaw
from deltaw import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    SFTConfig,
    SFTTrainer,
    SteeringCallback,
    causal_lm_loss,
    get_peft_model,
    load_model,
)
from deltaw.errors import AdapterError, CheckpointError, ConfigError
from deltaw.train.steering import STATE_NAME

STEPS = 8
ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("apple", "bird", "cat", "dog", "egg", "fish")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def settings(where: Path, **values: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(where), "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return SFTConfig(**{**defaults, **values})


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adalora(**values: Any) -> AdaLoraConfig:
    defaults: dict[str, Any] = {
        "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM", "orth_reg_weight": 0.1,
    }  # fmt: skip
    return AdaLoraConfig(**{**defaults, **values})


def trainer_of(folder: Any, where: Path, rows: Any = ROWS, config: Any = None, **values: Any) -> SFTTrainer:
    given = {key: values.pop(key) for key in ("callbacks", "eval_dataset") if key in values}
    args, config = settings(where, **values), config or adalora()
    return SFTTrainer(model=folder, args=args, train_dataset=rows, peft_config=config, **given)


def kept(model: Any) -> int:
    return sum(map(sum, model.peft_config["default"].rank_pattern.values()))


class Watch(TrainerCallback):
    """The steps that update_and_allocate() is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        own = model.base_model.update_and_allocate

        def told(step: int) -> None:
            self.steps.append(step)
            own(step)

        model.base_model.update_and_allocate = told


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # PEFT's own masks
def test_the_trainer_fills_in_the_schedule_and_hands_out_ranks(folder: str, tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_of(folder, tmp_path, callbacks=[watch])
    trainer.train()
    config = trainer.model.peft_config["default"]
    assert config.total_step == STEPS
    assert watch.steps == list(range(1, STEPS + 1))  # counted from 1, as PEFT's examples do
    assert kept(trainer.model) == 2 * len(config.rank_pattern)
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / STATE_NAME).exists()
    ids = torch.arange(3, 20).unsqueeze(0)
    wanted = trainer.model.eval()(input_ids=ids).logits
    for library in (deltaw, peft):
        back = library.PeftModel.from_pretrained(load_model(folder), tmp_path / "adapter")
        torch.testing.assert_close(back(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_accumulation_holds_the_penalty_once(folder: str, tmp_path: Path) -> None:
    """Rows of very different lengths, on both paths of the loss: the shares of the penalty add up to one."""
    rows = [{"text": "ab" * (1 + 9 * (i % 4))} for i in range(8)]
    results = []
    for fast, size, steps in ((True, 8, 1), (True, 2, 4), (False, 8, 1), (False, 2, 4)):
        trainer = trainer_of(
            folder, tmp_path, rows, adalora(orth_reg_weight=5.0, tinit=0, tfinal=0), fast_loss=fast, max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0.0,
            learning_rate=0.1, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer.train()
        assert trainer.fast == fast
        results.append(({n: p for n, p in trainer.model.named_parameters() if p.requires_grad}, losses(trainer)))
    (wanted, loss), *others = results
    for trained, seen in others:
        assert seen == pytest.approx(loss, rel=1e-5)
        for name, value in wanted.items():
            torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)


def test_fast_and_plain_loss_train_alike(folder: str, tmp_path: Path) -> None:
    fast, plain = (trainer_of(folder, tmp_path, fast_loss=flag) for flag in (True, False))
    fast.train(), plain.train()
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-4)
    assert fast.model.peft_config["default"].rank_pattern == plain.model.peft_config["default"].rank_pattern


def test_the_loss_of_an_evaluation_has_no_penalty(folder: str, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, config=adalora(orth_reg_weight=5.0))
    trainer.train()
    other = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert other < losses(trainer)[-1] - 5.0


@pytest.mark.parametrize("values", [{"tinit": 6}, {"tfinal": 8}])
def test_a_schedule_without_a_phase_to_hand_out_ranks_fails_before_the_first_step(
    folder: str, tmp_path: Path, values: dict[str, Any]
) -> None:
    watch = Watch()
    trainer = trainer_of(folder, tmp_path, config=adalora(**values), callbacks=[watch])
    with pytest.raises(ConfigError, match="leave none of the 8 steps of the run"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not watch.steps
    assert trainer.model.peft_config["default"].total_step is None


def test_a_run_too_short_for_its_schedule_is_reported(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "deltaw"):
        trainer_of(folder, tmp_path, config=adalora(total_step=100)).train()
    assert "reach their target at step 98, but this run ends at step 8" in caplog.text


@pytest.mark.parametrize(("stop", "every"), [(1, 1), (4, 3), (7, 1)])
def test_resuming_gives_the_uninterrupted_run(folder: str, tmp_path: Path, stop: int, every: int) -> None:
    """Bitwise: before, while and after ranks are handed out; triplets that were pruned come back with their values."""
    config = adalora(deltaT=every, lora_dropout=0.1, modules_to_save=["lm_head"])
    straight = trainer_of(folder, tmp_path / "a", config=config, save_strategy="steps", save_steps=stop)
    straight.train()
    again = trainer_of(folder, tmp_path / "b", config=config)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    a, b = (dict(t.model.named_parameters()) for t in (straight, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert again.model.peft_config["default"].rank_pattern == straight.model.peft_config["default"].rank_pattern


def test_without_its_state_a_checkpoint_brings_back_the_masks(folder: str, tmp_path: Path) -> None:
    trainer_of(folder, tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / STATE_NAME).unlink()
    pattern = json.loads((checkpoint / "adapter_config.json").read_text())["rank_pattern"]
    again = trainer_of(folder, tmp_path)
    again._load_from_checkpoint(str(checkpoint))
    assert again.model.peft_config["default"].rank_pattern == pattern
    ids = torch.arange(3, 20).unsqueeze(0)
    back = PeftModel.from_pretrained(load_model(folder), checkpoint)
    torch.testing.assert_close(again.model.eval()(input_ids=ids).logits, back(input_ids=ids).logits)
    assert kept(again.model) == 2 * len(pattern)
    with pytest.raises(CheckpointError, match=STATE_NAME):  # to load is one thing, to go on as if nothing were missing
        again.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_best_model_comes_back_with_its_ranks(folder: str, tmp_path: Path, save_only_model: bool) -> None:
    trainer = trainer_of(
        folder, tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        save_only_model=save_only_model, eval_dataset=ROWS,
    )  # fmt: skip
    trainer.train()
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evals[0] == max(evals) > evals[-1]
    assert (tmp_path / "checkpoint-2" / STATE_NAME).exists() != save_only_model
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evals[0], rel=1e-5)
    best = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())["rank_pattern"]
    assert trainer.model.peft_config["default"].rank_pattern == best
    trainer.save_model(str(tmp_path / "best"))
    again = PeftModel.from_pretrained(load_model(folder), tmp_path / "best")
    assert sum(len(p) for n, p in again.named_parameters() if "lora_E" in n) == sum(map(sum, best.values()))


def test_training_twice_starts_the_schedule_again(folder: str, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    trainer.train()
    trainer.train()
    assert kept(trainer.model) == 2 * len(trainer.model.peft_config["default"].rank_pattern)


def test_bf16_and_checkpointing(tmp_path: Path, folder: str) -> None:
    base = tiny_model().bfloat16()
    base.config.name_or_path = folder
    trainer = SFTTrainer(
        model=base,
        args=settings(tmp_path, max_steps=STEPS, bf16=True, gradient_checkpointing=True),
        train_dataset=ROWS,
        peft_config=adalora(),
        processing_class=trainer_of(folder, tmp_path).processing_class,
    )
    trainer.train()
    assert kept(trainer.model) == 2 * len(trainer.model.peft_config["default"].rank_pattern)
    assert {p.dtype for n, p in trainer.model.named_parameters() if "lora_" in n} == {torch.float32}


# --- transformers' own trainer ------------------------------------------------------------------------------------


def plain_trainer(where: Path, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), adalora())
    ids = torch.arange(3, 19).view(2, 8)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        output_dir=str(where), max_steps=STEPS, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no"
    )
    return Trainer(model=model, args=args, train_dataset=rows, **kwargs)  # type: ignore[arg-type]


def test_any_trainer_of_transformers_takes_the_callback(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, callbacks=[SteeringCallback()])
    trainer.train()
    model: Any = trainer.model
    assert model.peft_config["default"].total_step == STEPS
    assert kept(model) == 2 * len(model.peft_config["default"].rank_pattern)


def test_without_it_the_run_stops_at_once(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    with pytest.raises(AdapterError, match="SteeringCallback"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_other_methods_and_plain_models_are_left_alone(folder: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    before = {n: p.clone() for n, p in model.named_parameters()}
    callback: Any = SteeringCallback()
    state: Any = type("State", (), {"max_steps": 4, "global_step": 0})()
    for some in (model, model.get_base_model(), None):
        callback.on_train_begin(None, state, None, model=some)
        callback.on_optimizer_step(None, state, None, model=some)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    trainer = trainer_of(
        folder, tmp_path, config=LoraConfig(target_modules=["q_proj"]), save_strategy="steps", save_steps=4
    )
    trainer.train()
    assert not (tmp_path / "checkpoint-4" / STATE_NAME).exists()


def test_a_step_that_was_skipped_teaches_nothing() -> None:
    model = get_peft_model(tiny_model(), adalora(total_step=STEPS)).train()
    ids = torch.arange(3, 19).view(2, 8)
    causal_lm_loss(model, input_ids=ids, labels=ids).backward()
    callback: Any = SteeringCallback()
    state: Any = type("State", (), {"max_steps": STEPS, "global_step": 3})()
    callback.on_optimizer_step(None, state, None, model=model, optimizer=type("O", (), {"step_was_skipped": True})())
    assert model.peft_config["default"].rank_pattern is None
    callback.on_optimizer_step(None, state, None, model=model, optimizer=type("O", (), {"step_was_skipped": False})())
    assert model.peft_config["default"].rank_pattern is not None
