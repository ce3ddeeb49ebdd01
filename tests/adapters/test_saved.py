"""modules_to_save: whole modules in float32 beside their half-precision originals."""

import copy

import pytest
import torch
from peer import close, gradients, logits, stir
from torch import nn

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import ModulesToSaveWrapper
from deltaw.errors import AdapterError

CONFIG = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "model.norm"]}


def test_the_active_copy_runs_and_the_original_stays():
    layer = nn.Linear(3, 2)
    wrapper, x, before = ModulesToSaveWrapper(layer), torch.randn(4, 3), layer.weight.detach().clone()
    assert torch.equal(wrapper(x), layer(x))
    wrapper.add("a")
    wrapper.add("b")
    with torch.no_grad():
        wrapper.modules_to_save["a"].weight.zero_()
    for active, module in (("a", wrapper.modules_to_save["a"]), ("b", wrapper.modules_to_save["b"])):
        wrapper.set_active([active])
        assert torch.equal(wrapper(x), module(x))
        assert wrapper.weight is module.weight
        assert wrapper.active_adapters == [active]
        assert [p.requires_grad for p in module.parameters()] == [True, True]
    wrapper.enable_adapters(False)
    assert torch.equal(wrapper(x), layer(x))
    wrapper.enable_adapters(True)
    wrapper.remove("b")
    assert torch.equal(wrapper(x), layer(x))
    assert torch.equal(layer.weight, before)
    with pytest.raises(AdapterError, match="'a' already has a copy"):
        wrapper.add("a")


def test_two_whole_modules_cannot_be_added_up(llama):
    model = deltaw.get_peft_model(llama, LoraConfig(**CONFIG))
    model.add_adapter("b", LoraConfig(**CONFIG))
    with pytest.raises(AdapterError, match=r"\['default', 'b'\] each replace one module whole"):
        model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_masters_over_a_half_precision_base(make_llama, ids, tmp_path, dtype):
    base = logits(make_llama(dtype), ids)
    model = deltaw.get_peft_model(make_llama(dtype), LoraConfig(**CONFIG))
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert torch.equal(logits(model, ids), base)
    stir(model)
    grads = gradients(model, ids)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert sum("modules_to_save" in name for name in grads) == 3
    assert all(bool(g.any()) for g in grads.values())
    out = logits(model, ids)
    assert not close(out, base, 0.05)

    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(make_llama(dtype), tmp_path, is_trainable=True)
    assert torch.equal(logits(back, ids), out)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    with back.disable_adapter():
        assert torch.equal(logits(back, ids), base)
    merged = back.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert type(merged.lm_head) is nn.Linear
    assert close(logits(merged, ids), out, 0.02)


def test_autocast_adapter_dtype_false_keeps_the_base_s_dtype(make_llama, ids):
    model = deltaw.get_peft_model(make_llama(torch.bfloat16), LoraConfig(**CONFIG), autocast_adapter_dtype=False)
    model.add_adapter("b", LoraConfig(**CONFIG), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    gradients(stir(model), ids)


def test_a_small_update_does_not_vanish_in_the_master(make_llama):
    model = deltaw.get_peft_model(make_llama(torch.bfloat16), LoraConfig(**CONFIG))
    weight = model.base_model.model.model.norm.modules_to_save["default"].weight
    with torch.no_grad():
        before = weight.clone()
        for _ in range(100):
            weight += 1e-4
    assert torch.allclose(weight, before + 1e-2, rtol=1e-4)


def test_copies_share_nothing(llama):
    model = deltaw.get_peft_model(llama, LoraConfig(**CONFIG))
    other = copy.deepcopy(model)
    stir(other)
    assert not any(
        torch.equal(a, b)
        for (n, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True)
        if "modules_to_save" in n
    )
    assert model.get_input_embeddings().weight.shape == (
        128,
        32,
    )  # asked of the wrapper, answered by the copy
