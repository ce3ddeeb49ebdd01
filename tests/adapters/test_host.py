"""The host: what it holds, what runs, and merging with a bitwise way back."""

import pytest
import torch
from torch import nn

from deltaw import LoraConfig
from deltaw.adapters import BASE, Linear, Lora
from deltaw.adapters.routing import Routing, Run, _using
from deltaw.errors import AdapterError, MergeError


def make(dtype=torch.float32, names=("a",), bias=True, **fields) -> Linear:
    torch.manual_seed(0)
    host = Linear(nn.Linear(6, 5, bias=bias, dtype=dtype))
    for name in names:
        host.add(Lora, name, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **fields), "layer")
    host.set_active(list(names[:1]))
    return host


def test_it_looks_like_the_layer_it_wraps():
    host = make()
    base = host.base_layer
    assert host.weight is base.weight
    assert host.bias is base.bias
    assert (host.in_features, host.out_features) == (6, 5)
    assert host.get_base_layer() is base


def test_the_attributes_are_peft_s():
    host = make(names=("a", "b"), lora_dropout=0.1)
    assert list(host.lora_A) == list(host.lora_B) == list(host.lora_dropout) == ["a", "b"]
    assert host.scaling == {"a": 2.0, "b": 2.0}
    assert host.r == {"a": 2, "b": 2}
    assert (host.active_adapters, host.active_adapter, host.merged_adapters) == (["a"], ["a"], [])
    assert not host.merged
    assert not host.disable_adapters


def test_forward_runs_the_active_ones():
    host, x = make(names=("a", "b")), torch.randn(3, 6)
    base = host.base_layer(x)
    a, b = (x @ host.adapters[n].delta_weight().T for n in "ab")
    for names, update in ((["a"], a), (["b"], b), (["a", "b"], a + b), ([], 0 * a)):
        host.set_active(names)
        assert torch.allclose(host(x), base + update, atol=1e-6)
    host.set_active(["a"])
    host.enable_adapters(False)
    assert torch.equal(host(x), base)
    host.enable_adapters(True)
    assert not torch.equal(host(x), base)


def test_only_the_active_ones_train():
    host = make(names=("a", "b"))
    assert {n for n, p in host.named_parameters() if p.requires_grad and "base" not in n} == {
        "lora_A.a.weight",
        "lora_B.a.weight",
    }
    host.set_active(["a", "b"], trainable=False)
    assert not any(p.requires_grad for a in host.adapters.values() for p in a.parameters())


def test_gradients_can_be_asked_for_without_activating():
    host = make(names=("a", "b"))
    host.set_requires_grad("b")
    assert all(p.requires_grad for name in "ab" for p in host.adapters[name].parameters())
    host.set_requires_grad(["a", "not here"], False)
    assert [p.requires_grad for name in "ab" for p in host.adapters[name].parameters()] == [False, False, True, True]
    assert host.active_adapters == ["a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_mixed_batch_in_one_step_or_run_by_run(dtype, bias):
    host, x = make(dtype, names=("a", "b"), bias=bias), torch.randn(5, 3, 6).to(dtype)
    runs = [Run("b", 0, 1), Run(None, 1, 2), Run("a", 2, 4), Run("b", 4, 5)]
    fused, apart = host.mixed(x, runs), super(Linear, host).mixed(x, runs)
    assert torch.allclose(fused, apart, atol=1e-6 if dtype == torch.float32 else 3e-2)
    assert torch.equal(fused[1], host.base_layer(x)[1])
    assert torch.equal(apart[1], host.base_layer(x)[1])
    for run in runs:
        host.set_active([] if run.name is None else [run.name])
        assert torch.allclose(fused[run.rows], host(x[run.rows]), atol=1e-6 if dtype == torch.float32 else 3e-2)


def test_rows_of_one_name_take_the_same_way_as_without_names():
    host, x = make(names=("a", "b")), torch.randn(4, 6)
    expected = {}
    for names in ([], ["a"], ["b"]):
        host.set_active(names)
        expected[(names or [BASE])[0]] = host(x)
    for name, out in expected.items():
        with _using(Routing(host, [name] * 4, 4, ())):
            assert torch.equal(host(x), out)
    with _using(Routing(host, ["not here"] * 4, 4, ())):
        assert torch.equal(host(x), expected[BASE])


def test_what_keeps_a_mixed_batch_away():
    host = make()
    assert host.refusal() is None
    host.merge(["a"])
    assert "merged into the base" in str(host.refusal())
    host.enable_adapters(False)
    assert "disabled" in str(host.refusal())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge_rounds_once_and_unmerges_bitwise(dtype):
    host = make(dtype, names=("a", "b", "c"))
    before, bias = host.weight.detach().clone(), host.bias.detach().clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert host.adapters["a"].delta_weight().dtype == wide
    total = before.to(wide) + host.adapters["a"].delta_weight()
    host.merge(["a"])
    assert torch.equal(host.weight, total.to(dtype))
    host.merge(["b"])
    assert torch.equal(host.weight, (total + host.adapters["b"].delta_weight()).to(dtype))  # not rounded in between
    host.merge(["c"])
    host.unmerge(["b"])
    assert host.merged_adapters == ["a", "c"]
    assert torch.equal(host.weight, (total + host.adapters["c"].delta_weight()).to(dtype))
    host.unmerge()
    assert torch.equal(host.weight, before)
    assert torch.equal(host.bias, bias)
    assert not host.merged


def test_a_float64_base_loses_nothing_but_the_update():
    host = make(torch.float64)
    before = host.weight.detach().clone()
    host.merge(["a"])
    assert torch.allclose(host.weight - before, host.adapters["a"].delta_weight(), rtol=1e-9, atol=1e-15)


def test_merged_forward_is_the_base_s_own():
    host, x = make(), torch.randn(3, 6)
    apart = host(x)
    host.merge(["a"])
    assert torch.equal(host(x), host.base_layer(x))
    assert torch.allclose(host(x), apart, atol=1e-6)


def test_lora_bias_merges_scaled_and_unmerges_bitwise():
    host, x = make(lora_bias=True), torch.randn(3, 6)
    bias = host.bias.detach().clone()
    apart = host(x)
    host.merge(["a"])
    assert torch.allclose(host(x), apart, atol=1e-6)
    assert torch.allclose(host.bias, bias + 2.0 * host.lora_B["a"].bias)
    host.unmerge()
    assert torch.equal(host.bias, bias)


def test_merging_twice_is_refused():
    host = make()
    host.merge(["a"])
    with pytest.raises(MergeError, match=r"\['a'\] are merged already; call unmerge_adapter\(\)"):
        host.merge(["a"])


def test_a_merge_without_a_copy_cannot_be_undone():
    host = make()
    host.merge(["a"], keep=False)
    with pytest.raises(MergeError, match="without keeping a copy"):
        host.unmerge()


def test_a_bad_sum_changes_nothing_also_on_top_of_another_merge():
    host = make(torch.float16, names=("a", "b"))
    host.merge(["a"])
    merged = host.weight.detach().clone()
    host.lora_B["b"].weight.data.fill_(1e6)
    with pytest.raises(MergeError, match="not finite; the base was left as it was"):
        host.merge(["b"])
    assert host.merged_adapters == ["a"]
    assert torch.equal(host.weight, merged)


def test_disabling_and_removing_take_merged_ones_out():
    host = make(names=("a", "b"))
    before = host.weight.detach().clone()
    host.merge(["a"])
    host.enable_adapters(False)
    assert torch.equal(host.weight, before)
    host.enable_adapters(True)
    host.merge(["a", "b"])
    host.remove("b")
    assert host.merged_adapters == ["a"]
    host.remove("a")
    assert torch.equal(host.weight, before)
    assert not host.adapters
    assert [n for n, _ in host.named_parameters()] == ["base_layer.weight", "base_layer.bias"]


def test_a_name_is_used_once():
    host = make()
    with pytest.raises(AdapterError, match="adapter 'a' already exists on 'layer'"):
        host.add(Lora, "a", LoraConfig(), "layer")


def test_unmerge_follows_a_change_of_dtype():
    host = make()
    before = host.weight.detach().clone()
    host.merge(["a"])
    host.to(torch.bfloat16)
    host.unmerge()
    assert torch.equal(host.weight, before.bfloat16())
