"""Steps that are not finite: skipped without a trace in weights, states and schedule; counted, logged, and ended."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tinychat import tiny_model, tiny_tokenizer

from deltaw import AdaLoraConfig, LoraConfig, SFTConfig, SFTTrainer
from deltaw.data import TokenDataset
from deltaw.errors import NonFiniteError
from deltaw.train.checkpoints import newest
from deltaw.train.nonfinite import COUNT, FiniteSteps, rows_of

NAN, INF = math.nan, math.inf
ROWS = [{"prompt": f"say {i}: ", "completion": "ab" * (1 + i % 3)} for i in range(8)]


class Broken(SFTTrainer):
    """Adds ``bad[n]`` to the loss of micro-batch n, or to the first gradient of it, once each is computed."""

    bad: dict[int, float]
    where = "loss"
    calls = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, now = super().compute_loss(model, inputs, *args, **kwargs), self.bad.get(self.calls)
        self.calls += 1
        if now is None:
            return loss
        if self.where == "loss":
            return loss + now
        param = next(p for p in model.parameters() if p.requires_grad)
        hook = param.register_hook(lambda grad: (hook.remove(), grad + now)[1])
        return loss


def broken(where: Path, bad: dict[int, float], at: str = "loss", config: Any = None, **values: Any) -> Broken:
    settings: dict[str, Any] = {
        "output_dir": str(where), "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    dtype = values.pop("dtype", torch.float32)
    lora = config or LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = Broken(
        model=tiny_model().to(dtype),
        args=SFTConfig(**{**settings, **values}),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )
    trainer.bad, trainer.where = bad, at
    return trainer


def everything(trainer: SFTTrainer) -> dict[str, Any]:
    """All that a step moves, copied."""
    assert trainer.optimizer is not None
    assert trainer.lr_scheduler is not None
    tensors = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    states = {
        f"{i}.{key}": value.clone() if isinstance(value, torch.Tensor) else value
        for i, state in trainer.optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    return {**tensors, **states, "schedule": json.dumps(trainer.lr_scheduler.state_dict())}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def watched(trainer: Broken) -> list[dict[str, Any]]:
    """Trains, and gives everything as it was before the first step and after each."""
    seen: list[dict[str, Any]] = []
    norm, after = trainer._get_grad_norm, trainer._maybe_log_save_evaluate

    def first(*args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(everything(trainer))
        return norm(*args, **kwargs)

    def each(*args: Any, **kwargs: Any) -> None:
        after(*args, **kwargs)
        if trainer.state.global_step == len(seen):
            seen.append(everything(trainer))

    trainer._get_grad_norm, trainer._maybe_log_save_evaluate = first, each  # type: ignore[method-assign]
    trainer.train()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bad", "at"), [(NAN, "loss"), (INF, "loss"), (-INF, "loss"), (NAN, "grad"), (INF, "grad")])
def test_a_step_that_is_not_finite_moves_nothing(tmp_path: Path, bad: float, at: str, dtype: torch.dtype) -> None:
    trainer = broken(tmp_path, {2: bad}, at, dtype=dtype)
    seen = watched(trainer)
    assert len(seen) == 7
    moved = [not same(before, after) for before, after in itertools.pairwise(seen)]
    assert moved == [True, True, False, True, True, True]
    assert trainer.nonfinite_steps == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "sgd", "adamw_torch"])
def test_every_optimizer_is_left_alone(tmp_path: Path, optim: str) -> None:
    extra = {"optim_args": "min_8bit_size=1"} if optim == "adamw_8bit" else {}
    seen = watched(broken(tmp_path, {1: NAN}, optim=optim, **extra))
    assert same(seen[1], seen[2])
    assert not same(seen[2], seen[3])


def test_the_rank_budget_of_adalora_is_left_alone(tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=4,
        target_r=1,
        tinit=1,
        tfinal=1,
        deltaT=1,
        total_step=6,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
    )
    trainer = broken(tmp_path, {2: NAN}, config=config)
    steps: list[int] = []
    base: Any = trainer.model.base_model
    update = type(base).update_and_allocate
    base.update_and_allocate = lambda step: (steps.append(step), update(base, step))[1]
    trainer.train()
    assert steps == [1, 2, 4, 5, 6]


def test_accumulated_batches_are_skipped_as_one_step(tmp_path: Path) -> None:
    trainer = broken(tmp_path, {3: NAN}, gradient_accumulation_steps=2, max_steps=4)  # the second half of step 2
    seen = watched(trainer)
    assert [not same(a, b) for a, b in itertools.pairwise(seen)] == [True, False, True, True]


def test_the_log_says_nan_once_and_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "deltaw"):
        trainer = broken(tmp_path, {2: NAN}, logging_steps=2)
        output = trainer.train()
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    # at step 3 at once, and never again
    assert [(step, math.isnan(loss)) for step, loss in losses] == [(2, False), (3, True), (4, False), (6, False)]
    assert [entry.get(COUNT) for entry in trainer.state.log_history] == [None, 1, 1, 1, 1]
    assert [told for record in caplog.records if "skipped" in (told := record.getMessage())] == [
        "step 3: the loss is nan: the step is skipped (1 in a row, 1 in all)"
    ]
    whole = broken(tmp_path, {2: NAN}, logging_steps=1)
    assert output.metrics["train_loss"] == pytest.approx(whole.train().metrics["train_loss"], rel=1e-6)
    taken = [entry["loss"] for entry in whole.state.log_history if math.isfinite(entry.get("loss", NAN))]
    assert len(taken) == 5
    assert output.metrics["train_loss"] == pytest.approx(sum(taken) / 5, rel=1e-6)  # of the steps that were taken


def test_a_bad_gradient_keeps_its_loss_in_the_log(tmp_path: Path) -> None:
    trainer = broken(tmp_path, {2: INF}, "grad")
    trainer.train()
    entry = trainer.state.log_history[2]
    assert math.isfinite(entry["loss"])
    assert not math.isfinite(entry["grad_norm"])


def test_too_many_in_a_row_end_the_run_with_the_last_good_state(tmp_path: Path) -> None:
    trainer = broken(tmp_path, dict.fromkeys(range(2, 50), NAN), max_steps=20, learning_rate=1.0, max_grad_norm=0.0)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    said = str(caught.value)
    assert said.startswith("step 5: the loss is nan: 3 steps in a row were skipped")
    assert "learning_rate = 1, 5000 times what adapters usually take: try 0.0002" in said
    assert "max_grad_norm = 0" in said
    assert "the data of this step: rows " in said
    where = newest(tmp_path)
    assert where is not None
    assert where.name == "checkpoint-5"
    assert str(where) in said
    # what was saved is what two good steps gave, and the run goes on from there when the cause is gone
    good = broken(tmp_path / "good", {}, max_steps=20, learning_rate=1.0, max_grad_norm=0.0)
    after_two = watched_until(good, 2)
    again = broken(tmp_path, {}, max_steps=20, learning_rate=1.0, max_grad_norm=0.0)
    again._load_from_checkpoint(str(where))
    now = {n: p for n, p in again.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(now[name], after_two[name]) for name in now)
    again.train(resume_from_checkpoint=str(where))
    assert again.nonfinite_steps == 3  # of the whole run
    assert again.state.global_step == 20


def watched_until(trainer: Broken, steps: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    after = trainer._maybe_log_save_evaluate

    def each(*args: Any, **kwargs: Any) -> None:
        after(*args, **kwargs)
        if trainer.state.global_step == steps:
            seen.update(everything(trainer))
            trainer.control.should_training_stop = True

    trainer._maybe_log_save_evaluate = each  # type: ignore[method-assign]
    trainer.train()
    return seen


def test_a_good_step_in_between_starts_the_count_anew(tmp_path: Path) -> None:
    trainer = broken(tmp_path, {1: NAN, 2: NAN, 4: NAN, 5: INF}, max_steps=8)
    trainer.train()
    assert trainer.nonfinite_steps == 4


def test_weights_that_are_ruined_already_are_not_saved(tmp_path: Path) -> None:
    trainer = broken(tmp_path, {}, save_strategy="steps", save_steps=1, max_steps=8)
    after = trainer._maybe_log_save_evaluate

    def each(*args: Any, **kwargs: Any) -> None:
        after(*args, **kwargs)
        if trainer.state.global_step == 2:
            with torch.no_grad():
                next(p for p in trainer.model.parameters() if p.requires_grad)[0, 0] = INF

    trainer._maybe_log_save_evaluate = each  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"lora_A.* is not finite itself") as caught:
        trainer.train()
    assert "step 3" in str(caught.value)  # at once: no further step could help
    where = newest(tmp_path)
    assert where is not None
    assert where.name == "checkpoint-2"
    assert "checkpoint-2" in str(caught.value)


def test_a_damaged_base_is_named(tmp_path: Path) -> None:
    trainer = broken(tmp_path, {})
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight[7] = NAN
    with pytest.raises(NonFiniteError, match=r"lm_head.weight is not finite itself: the base model's files"):
        trainer.train()


def test_what_the_scaler_of_float16_looks_for_is_not_counted(tmp_path: Path) -> None:
    trainer = broken(tmp_path, {})

    class Scaler:
        scale = 65536.0

        def get_scale(self) -> float:
            return self.scale

    trainer.accelerator.scaler = scaler = Scaler()  # type: ignore[assignment]
    finite, bad = torch.tensor(1.0), torch.tensor(INF)
    assert trainer._look(bad, [finite]) is None
    assert trainer._look(bad, [bad]) is not None
    scaler.scale = 0.5  # it has searched all the way down
    assert trainer._look(bad, [finite]) is not None
    trainer.accelerator.scaler = None


def test_rows_are_found_by_their_tokens() -> None:
    ids = [[5, 6, 7], [5, 6], [9, 9, 9, 9], [5, 6, 8]]
    offsets = [0, 3, 5, 9, 12]
    flat = np.array([token for one in ids for token in one], np.int32)
    n = np.zeros(4, np.int32)
    tokens = TokenDataset(flat, np.ones(12, bool), np.array(offsets), n, n, np.array([0, 10, 20, 30]))
    padded = {
        "input_ids": torch.tensor([[5, 6, 8], [5, 6, 1]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    assert rows_of([padded], tokens) == [10, 30]
    joined = {"input_ids": torch.tensor([[9, 9, 9, 9, 5, 6]]), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]])}
    assert rows_of([joined], tokens) == [10, 20]
    assert rows_of([joined], [{"input_ids": [5]}, {"input_ids": [5, 6]}]) == [1]
    assert rows_of([joined], iter([])) == []  # a stream


def test_the_judgement_costs_next_to_nothing(tmp_path: Path) -> None:
    trainer = broken(tmp_path, {})
    norm, losses = torch.tensor(1.0), [torch.tensor(2.0)] * 4
    best = INF
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(20):
            FiniteSteps._look(trainer, norm, losses)
        best = min(best, (time.perf_counter() - begun) / 20)
    assert best < 5e-4  # 0.5% of a step of 100 ms
