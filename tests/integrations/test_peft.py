"""Beside PEFT and transformers: what our model passes for, what it does not take over, and who reads its files."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import is_peft_model
from peer import close, logits, stir
from peft.tuners.tuners_utils import BaseTunerLayer
from tinychat import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import host_layers
from deltaw.adapters.registry import CONFIGS
from deltaw.guises import guise

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def model(llama):
    return stir(deltaw.get_peft_model(llama, LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM")))


# --- isinstance -------------------------------------------------------------------------------------------------


def test_it_passes_for_peft_s_model_and_stays_ours(model: Any) -> None:
    for kind in (peft.PeftModel, peft.PeftModelForCausalLM, PeftModel, deltaw.PeftModelForCausalLM, nn.Module):
        assert isinstance(model, kind), kind
    for kind in (peft.PeftModelForSeq2SeqLM, deltaw.PeftModelForSeq2SeqLM, PreTrainedModel, nn.Linear):
        assert not isinstance(model, kind), kind
    assert is_peft_model(model)
    assert model.__class__.__name__ == type(model).__name__ == "PeftModelForCausalLM"
    assert model.__class__ is model.__class__


def test_none_of_peft_s_code_is_reached_through_it(model: Any) -> None:
    """TRL's GRPO broke where a subclass inherited PEFT's ``generate``."""
    assert not any(kind.__module__.startswith("peft") for kind in type(model).__mro__)
    for name in ("forward", "generate", "save_pretrained", "load_adapter", "disable_adapter", "__getattr__"):
        assert getattr(model, name).__func__.__module__.startswith("deltaw"), name
    for name in ("get_prompt", "_setup_prompt_encoder", "_cast_adapter_dtype", "add_weighted_nothing"):
        assert not hasattr(model, name)


def test_layers_pass_for_tuner_layers(model: Any) -> None:
    assert is_peft_model(model)
    layers = [layer for _, layer in host_layers(model)]
    assert len(layers) == 6
    assert all(isinstance(layer, BaseTunerLayer) for layer in layers)
    assert not any(isinstance(layer.base_layer, BaseTunerLayer) for layer in layers)


def test_the_base_is_not_marked_as_adapted(model: Any) -> None:
    """On the base the mark would send transformers' ``save_pretrained`` down PEFT's way."""
    assert model._hf_peft_config_loaded
    assert not model.get_base_model()._hf_peft_config_loaded


def test_copies_and_pickles_are_whole(model: Any, ids: Tensor) -> None:
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(logits(twin, ids), logits(model, ids))
        stir(twin)
        assert not torch.equal(logits(twin, ids), logits(model, ids))
        assert isinstance(twin, peft.PeftModel)


def test_its_class_can_be_set_as_fully_shard_does(model: Any, ids: Tensor) -> None:
    before = logits(model, ids)
    sharded = type("FSDPPeftModel", (type(model),), {})
    model.__class__ = sharded
    assert type(model) is sharded
    assert isinstance(model, (peft.PeftModelForCausalLM, PeftModel))
    assert torch.equal(logits(model, ids), before)


def test_a_library_that_is_not_imported_costs_nothing() -> None:
    code = """
import sys, torch, deltaw
from deltaw.adapters import host_layers
net = torch.nn.Sequential(torch.nn.Linear(4, 3))
model = deltaw.get_peft_model(net, deltaw.LoraConfig(target_modules=["0"]))
assert model.__class__ is type(model) is deltaw.PeftModel
assert not isinstance(model, torch.nn.Linear)
assert not {"peft", "trl", "transformers.trainer"} & set(sys.modules)
import peft  # a model that is there before PEFT passes for PEFT's all the same
from peft.tuners.tuners_utils import BaseTunerLayer
assert isinstance(model, peft.PeftModel)
assert isinstance(net[0], BaseTunerLayer)
print(model.__class__.__mro__[:3])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deltaw.model.PeftModel" in done.stdout


def test_while_peft_is_being_imported_a_model_is_only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", type(sys)("peft"))
    assert guise(PeftModel) is PeftModel


def test_peft_s_own_state_dict_function_agrees(model: Any) -> None:
    """accelerate calls it to save under FSDP."""
    theirs, ours = peft.get_peft_model_state_dict(model), deltaw.get_peft_model_state_dict(model)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


# --- transformers -----------------------------------------------------------------------------------------------


def test_a_pipeline_generates_through_the_adapter() -> None:
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    chat = stir(deltaw.get_peft_model(tiny_model(), config), 0.2).eval()
    tokenizer = tiny_tokenizer()
    ask: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    written = pipeline("text-generation", model=chat, tokenizer=tokenizer)("say cat", **ask)[0]["generated_text"]
    prompt = tokenizer("say cat", return_tensors="pt")
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    assert written == tokenizer.decode(chat.generate(input_ids=ids, attention_mask=mask, **ask)[0])
    assert written != tokenizer.decode(tiny_model().eval().generate(input_ids=ids, attention_mask=mask, **ask)[0])


#: (peft_type, fields beside the layers). transformers 5.23 misreads two methods, from PEFT's own files too: it leaves
#: DoRA's magnitudes at their start, and refuses AdaLoRA's shortened ranks. ``PeftModel.from_pretrained`` reads both.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LORA", {"r": 4, "lora_alpha": 8}),
    ("LORA", {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    ("LORA", {"modules_to_save": ["lm_head"]}),
    ("LOHA", {"r": 4, "alpha": 8}),
    ("LOKR", {"r": 4, "alpha": 8}),
]


@pytest.mark.parametrize(("method", "more"), CASES, ids=str)
def test_transformers_reads_our_files(tmp_path: Path, make_llama, ids: Tensor, method: str, more: dict) -> None:
    base = tmp_path / "base"
    make_llama().save_pretrained(base)
    config = CONFIGS[method](target_modules=TARGETS, task_type="CAUSAL_LM", **more)
    ours = stir(deltaw.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)).eval()
    ours.save_pretrained(tmp_path / "adapter")
    bare, wanted = logits(make_llama(), ids), logits(ours, ids)
    assert not close(wanted, bare, 1e-3)

    loaded = AutoModelForCausalLM.from_pretrained(base)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert close(logits(loaded, ids), wanted)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded, ids), bare)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), ids), wanted)
