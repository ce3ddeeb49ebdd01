"""How a model stands: PEFT's functions say the same of the same model."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
from peer import pair
from torch import nn

import deltaw
from deltaw import LoraConfig
from deltaw.adapters import host_layers
from deltaw.errors import AdapterError

FIELDS = {"target_modules": ["q_proj", "v_proj"], "r": 4}
#: where PEFT names classes of its own
NAMES = ("module_type", "adapter_model_type", "peft_types")


def plain(status: Any) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(status).items() if key not in NAMES}


def check(ours: Any, theirs: Any) -> None:
    assert plain(ours.get_model_status()) == plain(theirs.get_model_status())
    for mine, wanted in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        # PEFT lists what is active in the model, also on a layer that does not have it
        there = [name for name in wanted.active_adapters if name in wanted.available_adapters]
        assert plain(mine) == plain(dataclasses.replace(wanted, active_adapters=there))


@pytest.fixture
def models(make_llama) -> tuple[Any, Any]:
    """Ours and PEFT's with two adapters each, the first one active."""
    ours, theirs = pair(make_llama, **FIELDS, modules_to_save=["lm_head"])
    ours.add_adapter("b", LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]))
    theirs.add_adapter("b", peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]))
    return ours, theirs


def test_it_is_peft_s(models: tuple[Any, Any]) -> None:
    check(*models)
    status = models[0].get_model_status()
    assert status.peft_types == {"default": "LORA", "b": "LORA"}
    assert (status.active_adapters, status.enabled, status.merged_adapters) == (["default"], True, [])


@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.set_adapter("b"),
        lambda m: m.merge_adapter(),
        lambda m: m.delete_adapter("b"),
        lambda m: next(p for n, p in m.named_parameters() if "lora_A.default" in n).requires_grad_(False),
    ],
    ids=["set", "merge", "delete", "half-frozen"],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_it_follows_what_is_done(models: tuple[Any, Any], act: Any) -> None:
    for model in models:
        act(model)
    check(*models)


def test_layers_that_do_not_agree_are_called_irregular(models: tuple[Any, Any]) -> None:
    model = models[0]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    layer = next(layer for _, layer in host_layers(model))
    layer.enable_adapters(False)
    layer.set_active([])
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.requires_grad["default"]) == ("irregular",) * 3


def test_adapters_without_a_wrapper_around_the_model(llama) -> None:
    deltaw.inject_adapter_in_model(LoraConfig(**FIELDS), llama)
    status = deltaw.get_model_status(llama)
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "None")
    assert (status.num_adapter_layers, status.peft_types) == (4, {})
    assert deltaw.get_layer_status(llama)[0].name == "model.layers.0.self_attn.q_proj"


def test_a_model_without_adapters_is_an_error() -> None:
    for ask in (deltaw.get_layer_status, deltaw.get_model_status):
        with pytest.raises(AdapterError, match="Linear has no layer with an adapter"):
            ask(nn.Linear(2, 2))
