"""Memory that runs out: what the error says, and the limit that a run on a CPU is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tinychat import tiny_model, tiny_tokenizer

from deltaw import LoraConfig, SFTConfig, SFTTrainer
from deltaw.errors import ConfigError, DeltawError, OutOfMemory
from deltaw.footprint import anonymous
from deltaw.train.memory import limit_bytes, limited, ran_out

ROWS = [{"prompt": f"say {i}: ", "completion": "ab" * 20} for i in range(16)]
CPU = torch.device("cpu")
linux = pytest.mark.skipif(anonymous() is None, reason="only Linux tells a process's own memory")


def trainer_of(
    where: Path, kind: type[SFTTrainer] = SFTTrainer, r: int = 4, rows: Any = ROWS, **values: Any
) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(where), "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no",
        "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    return kind(
        model=tiny_model(),
        args=SFTConfig(**{**settings, **values}),
        train_dataset=rows,
        eval_dataset=ROWS[:4],
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


class Full(SFTTrainer):
    """Runs out of memory in the second step, as CUDA says it, or where it evaluates."""

    error: BaseException = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...\nMore")
    in_evaluation = False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and not self.in_evaluation:
            raise self.error
        return super().compute_loss(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(*args, **kwargs)
        if self.in_evaluation:
            raise self.error
        return found


def told(trainer: SFTTrainer, act: Any = None) -> str:
    with pytest.raises(OutOfMemory) as caught:
        (act or trainer.train)()
    assert isinstance(caught.value, DeltawError)
    return str(caught.value)


def test_what_takes_most_and_the_cures(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Full, save_strategy="steps", save_steps=1)
    said = told(trainer)
    lines = said.splitlines()
    assert lines[0].startswith("the memory of this machine ran out while training at step 2, on a batch of 4 x ")
    names = [line.strip().split("  ")[0] for line in lines[1:] if line.startswith("  ") and "- " not in line[:4]]
    assert {"base weights", "trained weights", "gradients", "optimizer states"} <= set(names)
    frozen = sum(p.nbytes for p in trainer.model.parameters() if not p.requires_grad)
    frozen += sum(b.nbytes for b in trainer.model.buffers())
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert f"base weights {frozen / 1024:18.1f} KiB, counted" in said
    assert f"trained weights {trained / 1024:15.1f} KiB, counted" in said
    cures = [line.removeprefix("  - ").split(":")[0] for line in lines if line.startswith("  - ")]
    assert cures[:3] == ["gradient_checkpointing", "per_device_train_batch_size", "padding_free"]
    assert "per_device_train_batch_size: 2 with gradient_accumulation_steps: 2: the same training" in said
    assert "Nothing was changed" in said
    assert f"The run can go on from {tmp_path / 'checkpoint-1'}" in said
    assert lines[-1] == "PyTorch said: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."
    assert trainer.args.per_device_train_batch_size == 4


def test_only_cures_that_are_not_taken_are_told(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, Full, gradient_checkpointing=True, per_device_train_batch_size=1, padding_free=True, fast_loss=False
    )
    cures = [line for line in told(trainer).splitlines() if line.startswith("  - ")]
    assert cures[0].startswith("  - fast_loss: true")
    assert not any("checkpointing" in cure or "batch" in cure or "padding" in cure for cure in cures)


def test_large_states_and_weights_bring_their_cures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.train.memory._in_use", lambda device: 0)  # so that the tiny weights are what counts
    said = told(trainer_of(tmp_path, Full, r=16))
    assert "load_in_4bit: true" in said
    assert "optim: adamw_8bit" in said
    assert "optim: adamw_8bit" not in told(trainer_of(tmp_path, Full, r=16, optim="adamw_8bit"))


def test_the_logits_of_a_model_s_own_forward_are_counted(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Full, fast_loss=False)
    said = told(trainer)
    assert trainer._shape is not None
    b, t = trainer._shape
    assert f"logits {2 * 4 * b * t * 258 / 1024:24.1f} KiB, counted" in said
    assert "fast_loss: true" in said


def test_evaluating_has_a_cure_of_its_own(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Full, eval_strategy="steps", eval_steps=1)
    trainer.in_evaluation = True  # type: ignore[attr-defined]
    for act in (trainer.train, trainer.evaluate):
        said = told(trainer, act)
        assert "ran out while evaluating" in said
        assert "per_device_eval_batch_size: 4: the same figures" in said
        assert "gradient_checkpointing" not in said


def test_other_errors_and_an_asked_for_search_pass_through(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Full)
    trainer.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.train()
    assert not ran_out(RuntimeError("some error"))
    assert not ran_out(OutOfMemory("told"))
    assert ran_out(MemoryError())
    assert ran_out(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"))


def test_sizes() -> None:
    assert limit_bytes("24GiB") == 24 * 2**30
    assert limit_bytes("1.5 GB") == 1_500_000_000
    assert limit_bytes("512mib") == 512 * 2**20
    assert limit_bytes(None) is None
    for bad in ("24", "24G", "lots", "-1GiB", "0GiB", "GiB", "nanGiB"):
        with pytest.raises(ConfigError, match=f"memory_limit = '{bad}' is no size: write it like 24GiB"):
            limit_bytes(bad)
    with pytest.raises(ConfigError, match="memory_limit"):
        SFTConfig(output_dir="x", memory_limit="many")


@linux
def test_a_limit_that_is_passed_already_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"take .* already"), limited(2**20, CPU):
        pass


@linux
def test_a_real_limit_ends_a_run_and_nothing_else(tmp_path: Path) -> None:
    if "DELTAW_FRESH" not in os.environ:  # what earlier tests have freed would be room beyond the limit
        test = f"{__file__}::test_a_real_limit_ends_a_run_and_nothing_else"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
            env={**os.environ, "DELTAW_FRESH": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return
    rows = [{"prompt": "say it", "completion": "ab" * 120}] * 64
    trainer = trainer_of(tmp_path, rows=rows, per_device_train_batch_size=64)
    room = 40 * 2**20
    before = anonymous() or 0
    trainer.args.memory_limit = before + room  # type: ignore[attr-defined]
    said = told(trainer)
    assert (anonymous() or 0) - before < room + 2**20
    assert said.startswith("the memory_limit of ")
    assert "on a batch of 64 x 2" in said
    assert "activations of the step" in said
    assert "per_device_train_batch_size: 32 with gradient_accumulation_steps: 2" in said
    assert "can't allocate memory" in said
    torch.empty(200 * 2**20, dtype=torch.uint8).fill_(1)  # the limit ends with the run
    trainer = trainer_of(tmp_path, rows=rows, per_device_train_batch_size=2, optim="adamw_8bit")
    trainer.args.memory_limit = (anonymous() or 0) + room  # type: ignore[attr-defined]
    trainer.train()  # a run that needs less is left alone
