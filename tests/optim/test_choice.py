"""Optimizers by a trainer's ``optim``: which is made, that it learns, resumes bitwise, and what its states take."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tinychat import save_tiny, tiny_model, write_rows
from torch import Tensor, nn

from deltaw import AdamW8bit, LoraConfig, PagedAdamW8bit, PagedAdamW32bit, SFTConfig, SFTTrainer
from deltaw.cli import main
from deltaw.errors import ConfigError
from deltaw.optim import StateBytes, optimizer_for, state_bytes

MADE = {
    "adamw_8bit": AdamW8bit,
    "adamw_bnb_8bit": AdamW8bit,
    "paged_adamw": PagedAdamW32bit,
    "paged_adamw_32bit": PagedAdamW32bit,
    "paged_adamw_8bit": PagedAdamW8bit,
    "sgd": torch.optim.SGD,
}
ROWS = [{"prompt": f"say {word}", "completion": word} for word in ("apple", "bird", "cat", "dog", "egg", "fish")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def trainer_of(folder: str, where: Path, config: LoraConfig | None = None, **values: Any) -> Any:
    args = SFTConfig(
        **{
            "output_dir": str(where), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
            "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, **values,
        }
    )  # fmt: skip
    config = config or LoraConfig(r=128, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(model=folder, args=args, train_dataset=ROWS, peft_config=config)


def adapters(trainer: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", MADE)
def test_a_run_uses_it_and_learns(name: str, folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rate = 0.1 if name == "sgd" else 1e-2
    trainer = trainer_of(folder, tmp_path, optim=name, learning_rate=rate, lr_scheduler_type="constant", max_steps=6)
    with caplog.at_level(logging.INFO, "deltaw"):
        metrics = trainer.train().metrics
    inner = trainer.optimizer.optimizer  # inside accelerate's wrapper
    assert type(inner) is MADE[name]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[3:]) < sum(losses[:3])  # three steps see every row once
    assert metrics["optimizer_state_bytes"] == state_bytes(trainer.optimizer).total
    assert f"optimizer states: {state_bytes(inner)}" in caplog.text
    assert (metrics["optimizer_state_bytes"] == 0) == (name == "sgd")


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_8bit", "sgd"])
def test_a_step_counts_as_a_change(name: str, folder: str, tmp_path: Path) -> None:
    """Values that adapters remember for their parameters are stamped with the versions of those."""
    trainer = trainer_of(folder, tmp_path, optim=name)
    params = [param for param in trainer.model.parameters() if param.requires_grad]
    before = [param._version for param in params]
    trainer.train()
    assert all(param._version >= version + 4 for param, version in zip(params, before, strict=True))


def test_settings_reach_the_optimizer(folder: str, tmp_path: Path) -> None:
    args = SFTConfig(
        output_dir=str(tmp_path), optim="paged_adamw_8bit", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6,
        optim_args=f"page_dir={tmp_path},paged_from=5,min_8bit_size=1", learning_rate=3e-3,
    )  # fmt: skip
    model = tiny_model()
    chosen = optimizer_for(args, model)
    assert chosen is not None
    kind, kwargs = chosen
    assert kind is PagedAdamW8bit
    tables = kwargs.pop("keep_float32")
    assert [id(table) for table in tables] == [id(model.get_input_embeddings().weight)]
    assert kwargs == {
        "lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "page_dir": str(tmp_path), "paged_from": 5, "min_8bit_size": 1,
    }  # fmt: skip
    momentum = optimizer_for(SFTConfig(output_dir=str(tmp_path), optim="sgd", optim_args="momentum=0.9"))
    assert momentum == (torch.optim.SGD, {"lr": 2e-4, "momentum": 0.9})
    for name in ("adamw_torch_fused", "adamw_torch", "adafactor"):
        assert optimizer_for(SFTConfig(output_dir=str(tmp_path), optim=name)) is None


def test_mistakes_are_told_with_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"two tokens\n.*optim='sgdd': no such optimizer; did you mean 'sgd'"):
        SFTConfig(output_dir="x", optim="sgdd", max_length=1)
    with pytest.raises(ConfigError, match="sgd takes no argument 'momentun'; did you mean 'momentum'"):
        SFTConfig(output_dir="x", optim="sgd", optim_args="momentun=0.9")
    with pytest.raises(ConfigError, match=r"optim = 'adamw_8bit': optim_args = 'a=1'"):
        optimizer_for(type("Args", (), {"optim": "adamw_8bit", "optim_args": "a=1", "learning_rate": 1.0}))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_run_resumes_bitwise(name: str, folder: str, tmp_path: Path) -> None:
    """All states that can be are in 8 bits, and paged."""
    keys: dict[str, Any] = {"optim": name}
    if name != "adamw_8bit":
        keys["optim_args"] = "paged_from=1"
    straight = trainer_of(folder, tmp_path / "a", **keys)
    straight.train()
    trainer_of(folder, tmp_path / "b", **keys, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "b" / "checkpoint-2"
    before = (checkpoint / "optimizer.pt").read_bytes()
    again = trainer_of(folder, tmp_path / "b", **keys)
    metrics = again.train(resume_from_checkpoint=str(checkpoint)).metrics
    a, b = adapters(straight), adapters(again)
    assert all(torch.equal(a[key], b[key]) for key in a)
    states = [state["exp_avg"].dtype for state in again.optimizer.state.values()]
    assert (torch.uint8 in states) == name.endswith("8bit")
    assert ("optimizer_paged_bytes" in metrics) == name.startswith("paged")
    assert (checkpoint / "optimizer.pt").read_bytes() == before  # it was mapped, and never written


def test_loading_with_torchs_optimizer_does_not_write_the_checkpoint(folder: str, tmp_path: Path) -> None:
    """Torch keeps the tensors it loads: mapped ones would be the file."""
    trainer_of(folder, tmp_path, optim="adamw_torch_fused", save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    before = (checkpoint / "optimizer.pt").read_bytes()
    trainer_of(folder, tmp_path, optim="adamw_torch_fused").train(resume_from_checkpoint=str(checkpoint))
    assert (checkpoint / "optimizer.pt").read_bytes() == before


def test_from_the_command_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    words = ["train", "--model-name-or-path", folder, "--dataset-name", str(rows), "--use-cpu", "--max-steps", "4"]
    words += ["--optim", "paged_adamw_8bit", "--optim-args", f"paged_from=1,page_dir={tmp_path}", "--r", "128"]
    words += ["--per-device-train-batch-size", "2", "--learning-rate", "1e-2", "--warmup-steps", "0"]
    monkeypatch.setenv("COLUMNS", "200")

    def run(where: str, *more: str) -> tuple[dict[str, Any], bytes]:
        with pytest.raises(SystemExit) as left:
            main([*words, "--output-dir", str(tmp_path / where), *more])
        assert not left.value.code, capsys.readouterr()
        out = tmp_path / where
        return json.loads((out / "all_results.json").read_text()), (out / "adapter_model.safetensors").read_bytes()

    results, straight = run("a", "--save-steps", "2")
    assert 0 < results["optimizer_paged_bytes"] <= results["optimizer_state_bytes"] < 8 * results["trainable_params"]
    os.rename(tmp_path / "a", tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "b" / name).unlink()
    _, resumed = run("b", "--resume-from-checkpoint", str(tmp_path / "b" / "checkpoint-2"))
    assert straight == resumed
    assert not list(tmp_path.glob("deltaw-pages-*"))
    with pytest.raises(SystemExit) as left:
        main([*words[:8], "--optim", "paged_adamw_8bits", "--output-dir", str(tmp_path / "c")])
    assert left.value.code
    assert "did you mean 'paged_adamw_8bit'" in capsys.readouterr().err.replace("\n", " ")


def test_bytes_in_words() -> None:
    assert str(StateBytes(3 * 2**20, 0)) == "3.0 MiB"
    assert str(StateBytes(3 * 2**20, 2**20)) == "3.0 MiB, 1.0 MiB of it paged"
    assert state_bytes(torch.optim.AdamW([nn.Parameter(torch.ones(3))])) == StateBytes(0, 0)
