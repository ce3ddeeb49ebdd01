"""TRL's trainers train a model that ``deltaw.get_peft_model`` made, as they train PEFT's: the same losses, gradients in
the adapters alone, adapter-only files that both libraries read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from peer import logits, stir
from safetensors.torch import load_file
from tinychat import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.utils import use_adapter

import deltaw

# TRL 1.16 switches checkpointing under the names that transformers 5.23 calls old
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")

WORDS = ("apple", "bird", "cat", "dog", "egg", "fish", "goat", "hat")
CONFIG = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapted(library: Any = deltaw) -> Any:
    """An adapter that has learned something already, the same numbers in either library."""
    torch.manual_seed(3)
    return stir(library.get_peft_model(tiny_model(), library.LoraConfig(**CONFIG)))


def sft(model: Any, where: Path, **values: Any) -> trl.SFTTrainer:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {word}"}],
            "completion": [{"role": "assistant", "content": word}],
        }
        for word in WORDS
    ]
    args = trl.SFTConfig(**settings(where, **values))
    return trl.SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(), callbacks=[Watch()]
    )


def dpo(model: Any, where: Path, **values: Any) -> trl.DPOTrainer:
    rows = [{"prompt": f"say {word}", "chosen": f" {word}", "rejected": f" no {word}"} for word in WORDS]
    args = trl.DPOConfig(**settings(where, **values))
    return trl.DPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(), callbacks=[Watch()]
    )


def grpo(model: Any, where: Path, **values: Any) -> trl.GRPOTrainer:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    more = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "temperature": 1.0}
    args = trl.GRPOConfig(**settings(where, **more, **values))
    rows = Dataset.from_list([{"prompt": f"say {word}"} for word in WORDS])
    return trl.GRPOTrainer(
        model, reward, args=args, train_dataset=rows, processing_class=tiny_tokenizer(), callbacks=[Watch()]
    )


TRAINERS: dict[str, Callable[..., Any]] = {"sft": sft, "dpo": dpo, "grpo": grpo}


def settings(where: Path, **values: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": str(where),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
    }
    return {**defaults, **values}


class Watch(TrainerCallback):
    """Which parameters had a gradient when the optimizer stepped."""

    def __init__(self) -> None:
        self.with_gradient: set[str] = set()

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.with_gradient |= {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def seen(trainer: Any) -> set[str]:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Watch)).with_gradient


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_as_peft_s_model_does(name: str, checkpointing: bool, tmp_path: Path) -> None:
    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ours = TRAINERS[name](model, tmp_path / "ours", activation_checkpointing=checkpointing)
    ours.train()
    theirs = TRAINERS[name](adapted(peft), tmp_path / "theirs", activation_checkpointing=checkpointing)
    theirs.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-3, abs=1e-4)
    assert len(losses(ours)) == 3

    trained = {n for n, p in model.named_parameters() if not torch.equal(p, before.get(n, p))}
    assert trained == seen(ours) == {n for n in before if "lora_" in n}
    assert trained == seen(theirs)
    for name_, parameter in theirs.model.named_parameters():
        assert torch.allclose(model.get_parameter(name_), parameter, rtol=1e-3, atol=1e-4), name_


@pytest.mark.parametrize("name", TRAINERS)
def test_it_saves_adapters_alone_and_both_read_them(name: str, tmp_path: Path) -> None:
    trainer = TRAINERS[name](adapted(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.rglob("model*.safetensors"))
    assert all("lora_" in key for key in load_file(folder / "adapter_model.safetensors"))
    ids = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted = logits(trainer.model.eval(), ids)
    assert torch.equal(logits(deltaw.PeftModel.from_pretrained(tiny_model(), folder).eval(), ids), wanted)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(tiny_model(), folder).eval(), ids), wanted, rtol=1e-4)
    tuned = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    assert "lora_A" in "".join(tuned)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_run_resumes_where_it_stopped(name: str, tmp_path: Path) -> None:
    straight = TRAINERS[name](adapted(), tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    straight.train()
    resumed = TRAINERS[name](adapted(), tmp_path / "again", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(straight)[-2:]
    for key, parameter in straight.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(key), parameter), key


def test_dpo_s_reference_is_a_frozen_copy_of_the_adapter(tmp_path: Path) -> None:
    """TRL adds an adapter named ref and copies each ``.default.`` parameter to ``.ref.``."""
    model = adapted()
    start = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    trainer = dpo(model, tmp_path)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)  # policy and reference agree at the start
    assert list(model.peft_config) == ["default", "ref"]
    assert start
    for name, value in start.items():
        assert torch.equal(model.get_parameter(name.replace(".default.", ".ref.")), value), name
        assert not torch.equal(model.get_parameter(name), value), name
    assert model.active_adapters == ["default"]


def test_without_a_reference_adapter_it_is_the_base(tmp_path: Path) -> None:
    model = adapted().eval()
    ids = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    with use_adapter(model, None):
        assert torch.equal(logits(model, ids), logits(tiny_model().eval(), ids))
    assert not torch.equal(logits(model, ids), logits(tiny_model().eval(), ids))


def test_an_adapter_on_the_head_is_refused_as_peft_s_is(tmp_path: Path) -> None:
    """TRL multiplies with ``lm_head.weight`` itself: an adapter there would not train, in silence."""
    model = deltaw.get_peft_model(tiny_model(), deltaw.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        sft(model, tmp_path)


def test_grpo_generates_through_the_adapter(tmp_path: Path) -> None:
    model = adapted().eval()
    ids = torch.tensor([[5, 6, 7]])
    ask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with_adapter: Tensor = model.generate(input_ids=ids, **ask)
    with model.disable_adapter():
        assert torch.equal(model.generate(input_ids=ids, **ask), tiny_model().eval().generate(input_ids=ids, **ask))
    assert torch.equal(with_adapter, adapted(peft).eval().generate(input_ids=ids, **ask))
