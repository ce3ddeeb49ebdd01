"""State dicts of adapters: PEFT's keys and values, there and back, and refilling an adapter that is in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peer import ATTENTION, logits, pair, same_state, state, stir
from safetensors.torch import load_file
from torch import Tensor, nn

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.errors import AdapterError, CheckpointError

CASES = [
    {"target_modules": ATTENTION},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "bias": "all", "use_rslora": True},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_keys_and_values_are_peft_s_and_the_file_s(make_llama, tmp_path: Path, fields: dict[str, Any]) -> None:
    ours, theirs = (stir(m) for m in pair(lambda: make_llama(bias=True), **fields))
    got, wanted = deltaw.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], wanted[key]) for key in got)
    assert not any(tensor.requires_grad for tensor in got.values())
    ours.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert got.keys() == file.keys()
    assert all(torch.equal(got[key], file[key]) for key in got)


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_set_brings_back_what_get_gave(make_llama, ids: Tensor, fields: dict[str, Any]) -> None:
    trained, theirs = (stir(m) for m in pair(lambda: make_llama(bias=True), **fields))
    for tensors in (deltaw.get_peft_model_state_dict(trained), peft.get_peft_model_state_dict(theirs)):
        fresh = deltaw.get_peft_model(make_llama(bias=True), LoraConfig(**fields))
        assert not torch.equal(logits(fresh, ids), logits(trained, ids))
        result = deltaw.set_peft_model_state_dict(fresh, tensors)
        assert result.missing_keys == result.unexpected_keys == []
        assert torch.equal(logits(fresh, ids), logits(trained, ids))


def test_values_may_come_from_a_gathered_state_dict(make_llama) -> None:
    model = stir(deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=ATTENTION, modules_to_save=["lm_head"])))
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    plain, moved = (deltaw.get_peft_model_state_dict(model, state_dict=s) for s in (None, gathered))
    assert plain.keys() == moved.keys()
    assert all(torch.equal(plain[key] + 1, moved[key]) for key in plain)
    name = next(n for n in gathered if "lora_B" in n)
    del gathered[name]
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of adapter 'default': .*lora_B\.default\.weight"):
        deltaw.get_peft_model_state_dict(model, state_dict=gathered)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
        LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, r=8),
        deltaw.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, tinit=1, tfinal=2),
    ],
    ids=["start taken off", "tied", "pruned"],
)
def test_values_by_name_take_the_form_of_a_file(make_llama, config) -> None:
    model = deltaw.get_peft_model(make_llama(tied=True), config)
    if config.peft_type == "ADALORA":
        for step in range(1, 11):
            sum(parameter.square().sum() for parameter in model.parameters() if parameter.requires_grad).backward()
            model.base_model.update_and_allocate(step)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = deltaw.get_peft_model_state_dict(stir(model), state_dict=model.state_dict())
    own = deltaw.get_peft_model_state_dict(model)
    assert trained.keys() == own.keys()
    assert all(torch.equal(trained[key], own[key]) for key in own)
    before = deltaw.get_peft_model_state_dict(model, state_dict=start)  # the values, not those that the model holds
    assert all(trained[key].shape == before[key].shape for key in own)
    assert any(not torch.equal(trained[key], before[key]) for key in own)
    assert all(torch.equal(own[key], now) for key, now in deltaw.get_peft_model_state_dict(model).items())


def test_embeddings_come_along_when_asked(make_llama) -> None:
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    keys = deltaw.get_peft_model_state_dict(model, save_embedding_layers=True).keys()
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= keys
    assert not any("embed" in key for key in deltaw.get_peft_model_state_dict(model))


def test_a_compiled_model_is_unwrapped_and_other_adapters_are_left_out(make_llama) -> None:
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("b", LoraConfig(target_modules=["v_proj"]))
    keys = deltaw.get_peft_model_state_dict(torch.compile(model), adapter_name="b").keys()
    assert keys
    assert all("v_proj" in key for key in keys)


def test_what_does_not_fit_is_one_error_and_changes_nothing(make_llama) -> None:
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    tensors = deltaw.get_peft_model_state_dict(model)
    before = state(model)
    first, second, *_ = tensors
    broken = {**tensors, first: torch.full_like(tensors[first], torch.nan), "stranger": torch.zeros(1)}
    broken[second] = broken[second][:1]
    with pytest.raises(CheckpointError, match=r"3 faults") as caught:
        deltaw.set_peft_model_state_dict(model, broken)
    assert all(words in str(caught.value) for words in ("not finite", "stranger", "shape of"))
    assert same_state(model, before)
    with pytest.raises(CheckpointError, match="ignore_mismatched_sizes=True would leave"):
        deltaw.set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)
    with pytest.raises(AdapterError, match=r"no adapter 'defalt'; .*did you mean 'default'"):
        deltaw.get_peft_model_state_dict(model, adapter_name="defalt")
    with pytest.raises(AdapterError, match="Linear is no PeftModel of deltaw"):
        deltaw.get_peft_model_state_dict(nn.Linear(2, 2))


# --- an adapter that is there already ---------------------------------------------------------------------------


@pytest.fixture
def saved(make_llama, tmp_path: Path) -> Any:
    def save(**fields: Any) -> tuple[PeftModel, Path]:
        model = stir(deltaw.get_peft_model(make_llama(), LoraConfig(**{"target_modules": ["q_proj"], **fields})))
        model.save_pretrained(tmp_path)
        return model, tmp_path

    return save


def test_loading_under_a_name_that_is_there_fills_it(saved: Any, make_llama, ids: Tensor) -> None:
    """transformers' Trainer resumes and takes back the best checkpoint in this way."""
    trained, folder = saved(r=4, lora_dropout=0.5)
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"], r=4)).eval()
    model.load_adapter(folder, "default")
    assert torch.equal(logits(model, ids), logits(trained.eval(), ids))
    assert model.active_adapters == ["default"]
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_alpha": 32}, "lora_alpha: 32 in the file, 8 here"),
        ({"use_rslora": True}, "use_rslora: True in the file, False here"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern: .*'q_proj': 3"),
    ],
)
def test_a_file_that_computes_otherwise_is_refused(saved: Any, make_llama, fields: Any, words: str) -> None:
    """The tensors would fit, and mean something else."""
    _, folder = saved(**fields)
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    before = state(model)
    with pytest.raises(AdapterError, match=words):
        model.load_adapter(folder, "default")
    assert same_state(model, before)
    model.load_adapter(folder, "other")


def test_tensors_that_do_not_fit_are_refused(saved: Any, make_llama) -> None:
    _, folder = saved(r=2)
    model = deltaw.get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    before = state(model)
    with pytest.raises(CheckpointError, match=r"shape of .*q_proj"):
        model.load_adapter(folder, "default")
    assert same_state(model, before)


def test_a_merged_adapter_is_not_replaced(saved: Any) -> None:
    model, folder = saved()
    model.merge_adapter()
    with pytest.raises(AdapterError, match="is merged into the base; unmerge_adapter"):
        model.load_adapter(folder, "default")
    model.unmerge_adapter()
    model.load_adapter(folder, "default")
