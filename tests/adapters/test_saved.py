"""modules_to_save: whole modules in float32 beside their half-precision originals."""

import copy

import pytest
import torch
from peer import close, gradients, logits, same_state, state, stir
from torch import nn

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import BASE, ModulesToSaveWrapper
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


# --- batches that mix adapters ------------------------------------------------------------------------------------

NAMES = ["default", "b", BASE, "default", "plain"]


def three(base) -> PeftModel:
    """``default`` and ``b`` have copies of their own, ``plain`` has none."""
    model = stir(deltaw.get_peft_model(base, LoraConfig(**CONFIG)))
    model.add_adapter("b", LoraConfig(**{**CONFIG, "r": 2}))
    model.add_adapter("plain", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    return stir(model, adapter="b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_goes_through_its_adapter_s_copy(make_llama, dtype):
    model = three(make_llama(dtype))
    ids = torch.randint(3, 128, (5, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(input_ids=ids, adapter_names=NAMES).logits.float()
    assert torch.equal(out[2], logits(make_llama(dtype), ids)[2])
    for row, name in enumerate(NAMES):
        if name != BASE:
            model.set_adapter(name)
            assert close(out[row], logits(model, ids[row : row + 1])[0], 1e-6 if dtype == torch.float32 else 2e-2)


def test_gradients_reach_each_copy_from_its_own_rows(make_llama):
    model = three(make_llama(torch.float64)).train()
    ids = torch.randint(3, 128, (5, 6), generator=torch.Generator().manual_seed(1))
    weight = torch.randn(5, 6, 128, dtype=torch.float64)
    for row, name in enumerate(NAMES):
        if name != BASE:
            model.set_adapter(name)
            (model(input_ids=ids[row : row + 1]).logits * weight[row]).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_requires_grad(["default", "b", "plain"])
    (model(input_ids=ids, adapter_names=NAMES).logits * weight).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert sum("modules_to_save" in name for name in found) == 6
    assert all(close(found[name], expected[name], 1e-9) for name in found)


def test_a_copy_that_gives_no_row_for_a_row_is_refused_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.pool = nn.Linear(3, 3), nn.GRU(3, 3, batch_first=True)

        def forward(self, x):
            return self.pool(self.layer(x))[0]

    model = deltaw.get_peft_model(Net(), LoraConfig(target_modules=["layer"], modules_to_save=["pool"]))
    model.add_adapter("b", LoraConfig(target_modules=["layer"]))
    x = torch.randn(2, 4, 3)
    before = state(model)
    model(x, adapter_names=["default", "default"])
    with pytest.raises(AdapterError, match=r"GRU \(modules_to_save\) does not give one tensor with a row"):
        model(x, adapter_names=["default", "b"])
    assert same_state(model, before)


def test_arguments_are_cut_along_with_their_rows():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x, by, shift=None, *, factor=1.0):
            return x * self.weight * by * factor + shift

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 3), Scale()

        def forward(self, x, by, shift):
            return self.scale(self.layer(x), by, shift=shift, factor=2.0)

    config = LoraConfig(target_modules=["layer"], modules_to_save=["scale"])
    model = stir(deltaw.get_peft_model(Net(), config))
    model.add_adapter("b", config)
    stir(model, adapter="b")
    x, by, shift = torch.randn(3, 2, 3), torch.randn(3, 1, 1), torch.randn(1, 1, 3)
    names = ["default", BASE, "b"]
    out = model(x, by, shift, adapter_names=names)
    for row, name in enumerate(names):
        one = slice(row, row + 1)
        assert torch.allclose(out[one], model(x[one], by[one], shift, adapter_names=[name]), atol=1e-6)
