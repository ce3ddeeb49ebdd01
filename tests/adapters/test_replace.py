"""LoftQ's A and B over a quantized base that stays as it is."""

from __future__ import annotations

import peft
import pytest
import torch
from peer import logits

import deltaw
from deltaw.adapters import host_layers
from deltaw.errors import AdapterError, ModelError
from deltaw.quant import NF4Config


def quantized(make_llama, **fields):
    model = make_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deltaw.quantize_(model, NF4Config(bnb_4bit_use_double_quant=True))
    config = deltaw.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **fields})
    return deltaw.get_peft_model(model, config), weights


def errors(model, weights) -> dict[str, float]:
    return {
        path: (weights[f"{path}.weight"] - host.store.dequantize() - host.adapters["default"].delta_weight())
        .norm()
        .item()
        for path, host in host_layers(model.get_base_model())
    }


@pytest.mark.parametrize("rslora", [False, True])
def test_every_layer_comes_nearer_and_the_base_stays(make_llama, ids, rslora):
    model, weights = quantized(make_llama, use_rslora=rslora)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    before, apart = errors(model, weights), (logits(make_llama(), ids) - logits(model, ids)).norm()
    with deltaw.full_weights(weights):
        deltaw.replace_lora_weights_loftq(model)
    after = errors(model, weights)
    assert len(after) == 14
    assert all(after[path] < before[path] for path in before)
    assert (logits(make_llama(), ids) - logits(model, ids)).norm() < apart
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items() if name in base)
    assert any(p.requires_grad for p in model.parameters())


def test_it_is_peft_s_step_where_its_scaling_is_one(make_llama):
    from peft.utils.loftq_utils import _low_rank_decomposition

    model, weights = quantized(make_llama, lora_alpha=4)
    with deltaw.full_weights(weights):
        deltaw.replace_lora_weights_loftq(model)
    assert peft.__version__
    for path, host in host_layers(model.get_base_model()):
        parts = _low_rank_decomposition(weights[f"{path}.weight"] - host.store.dequantize(), reduced_rank=4)
        assert torch.allclose(host.adapters["default"].delta_weight(), parts["L"] @ parts["R"], atol=1e-6)


def test_it_reads_the_folder_it_is_given_and_asks_before_it_keeps(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path)
    model, weights = quantized(make_llama)
    seen, before = [], errors(model, weights)

    def keeps(whole, name):
        assert whole is model
        seen.append(name)
        return name.endswith("q_proj")

    deltaw.replace_lora_weights_loftq(model, tmp_path, callback=keeps)
    after = errors(model, weights)
    assert seen == list(after)
    assert all((after[path] < before[path]) == path.endswith("q_proj") for path in after)
    deltaw.replace_lora_weights_loftq(model, tmp_path / "model.safetensors")
    assert all(error < before[path] for path, error in errors(model, weights).items())


def test_what_cannot_be_done_is_refused(make_llama, llama):
    model, weights = quantized(make_llama)
    with pytest.raises(AdapterError, match="did you mean 'default'"):
        deltaw.replace_lora_weights_loftq(model, adapter_name="defualt")
    plain = deltaw.get_peft_model(llama, deltaw.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="no quantized layer"):
        deltaw.replace_lora_weights_loftq(plain)
    with pytest.raises(ModelError, match=r"deltaw\.full_weights"):
        deltaw.replace_lora_weights_loftq(model)
    model.merge_adapter()
    with deltaw.full_weights(weights), pytest.raises(AdapterError, match="unmerge_adapter"):
        deltaw.replace_lora_weights_loftq(model)
    own, _ = quantized(make_llama, r=2)
    with deltaw.full_weights(weights):
        own.add_adapter(
            "own", deltaw.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa", inference_mode=True)
        )
        with pytest.raises(AdapterError, match="of its own"):
            deltaw.replace_lora_weights_loftq(own, adapter_name="own")
