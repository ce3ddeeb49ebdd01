"""A model that transformers loaded with bitsandbytes is accepted as it is: bit for bit, in the same memory."""

from __future__ import annotations

from pathlib import Path

import bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from deltaw import LoraConfig, NF4Linear, get_peft_model, inject_adapter_in_model
from deltaw.errors import ModelError, TargetError
from deltaw.quant.adopt import adopt_
from deltaw.weights import store_of

Linear4bit = bnb.bitsandbytes.nn.Linear4bit


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def load(folder: Path, **keys):
    keys = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16", **keys}
    config = BitsAndBytesConfig(load_in_4bit=True, **keys)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_layers_are_taken_over_bit_for_bit_in_the_same_memory(folder, quant_type, nested, storage):
    model = load(
        folder,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
    )
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    theirs = adopt_(model)
    assert len(theirs) == 14
    for name, old in theirs.items():
        new = model.get_submodule(name)
        assert isinstance(old, Linear4bit)
        assert isinstance(new, NF4Linear)
        assert new.weight.data_ptr() == old.weight.data_ptr()
        assert new.absmax.data_ptr() == old.weight.quant_state.absmax.data_ptr()
        assert new.bias is old.bias
        assert new.compute_dtype == torch.bfloat16
        expected = bnb.dequantize(old.weight.data, old.weight.quant_state)
        assert torch.equal(store_of(new).dequantize(), expected)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[k].view(torch.uint8), state[k].view(torch.uint8)) for k in state if state[k].dim())


def test_get_peft_model_adopts_and_trains(folder, ids):
    model = load(folder)
    model.train()  # in evaluation bitsandbytes would repack its weights
    expected = model(ids).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert not [module for module in model.modules() if isinstance(module, Linear4bit)]
    out = adapted(input_ids=ids, labels=ids)
    assert torch.allclose(out.logits, expected, atol=2e-2)
    out.loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    first = adapted(ids).logits
    adapted.train().eval()
    assert torch.equal(adapted(ids).logits, first)


def test_the_adopted_base_saves_for_bitsandbytes(folder, tmp_path):
    model = load(folder)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).unload()
    base.save_pretrained(tmp_path)  # type: ignore[operator]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_a_failed_injection_leaves_bitsandbytes_layers(folder):
    model = load(folder)
    before = dict(model.named_modules())
    with pytest.raises(TargetError):
        get_peft_model(model, LoraConfig(target_modules=["nothing"]))
    assert dict(model.named_modules()) == before


def test_injection_without_a_wrapper_adopts_too(folder):
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), load(folder))
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)  # type: ignore[union-attr]


def test_repacked_weights_are_refused(folder, ids):
    model = load(folder, bnb_4bit_use_double_quant=True)
    model.eval()
    with torch.no_grad():
        model(ids)
    if not getattr(model.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks on CPUs with AVX-512 BF16 only")
    with pytest.raises(ModelError, match=r"q_proj and 13 more: .*repacked.*load the model again"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)


def test_weights_that_are_not_quantized_yet_are_refused():
    model = torch.nn.Sequential(Linear4bit(64, 64))
    with pytest.raises(ModelError, match="in full until it is moved to its device"):
        adopt_(model)
