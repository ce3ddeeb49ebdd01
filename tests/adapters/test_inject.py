"""Injection: all or nothing, PEFT's parameter names, the base frozen."""

from types import SimpleNamespace

import peft
import pytest
import torch
from matrix import SMALL
from peer import close, logits, pair, same_state, state, stir
from torch import nn

import deltaw
from deltaw import LoraConfig
from deltaw.adapters import HostLayer, host_layers, inject, remove_adapter
from deltaw.adapters.methods.lora import Lora
from deltaw.errors import AdapterError, ConfigError, ModelError, TargetError
from deltaw.methods import METHODS


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "lora_dropout": 0.1},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True},
        {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
    ],
    ids=str,
)
def test_parameters_are_named_ordered_and_trainable_as_peft_s(make_llama, fields):
    ours, theirs = pair(lambda: make_llama(bias=True), **fields)
    assert [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in theirs.named_parameters()
    ]


@pytest.mark.parametrize("method", METHODS)
def test_injection_without_a_wrapper_is_peft_s_and_the_wrapper_s(llama, make_llama, ids, method):
    """The same parameters, under the names that they have in the bare model, and the same numbers."""
    fields = {**SMALL[METHODS[method].config], **METHODS[method].fixes, "target_modules": ["q_proj", "up_proj"]}
    peer, base = make_llama(), make_llama()
    torch.manual_seed(3)
    theirs = peft.inject_adapter_in_model(getattr(peft, METHODS[method].config)(**fields), peer, "a")
    torch.manual_seed(3)
    ours = deltaw.inject_adapter_in_model(getattr(deltaw, METHODS[method].config)(**fields), base, "a")
    assert ours is base
    peers = list(theirs.named_parameters())
    assert [(n, p.shape, p.requires_grad) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.requires_grad) for n, p in peers
    ]
    if method in ("pissa", "olora"):  # PEFT takes the start off the base
        assert close(logits(ours, ids), logits(theirs, ids), 1e-5)
    else:
        assert all(torch.equal(a, b) for a, (_, b) in zip(ours.parameters(), peers, strict=True))
        stir(ours, adapter="a"), stir(theirs, adapter="a")
        assert close(logits(ours, ids), logits(theirs, ids), 2e-6)
    torch.manual_seed(3)
    wrapped = deltaw.get_peft_model(llama, getattr(deltaw, METHODS[method].config)(**fields), "a")
    assert [n for n, _ in wrapped.get_base_model().named_parameters()] == [n for n, _ in peers]


def test_any_module_will_do_and_comes_back_itself():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    before = net(x)
    out = deltaw.inject_adapter_in_model(LoraConfig(target_modules=["0"]), net)
    assert out is net
    assert torch.equal(net(x), before)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        "0.lora_A.default.weight",
        "0.lora_B.default.weight",
    ]
    with pytest.raises(AdapterError, match="'default' already exists"):
        deltaw.inject_adapter_in_model(LoraConfig(target_modules=["2"]), net)
    with pytest.raises(AdapterError, match="injected already"):
        deltaw.get_peft_model(net, LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("where", ["create", "initialise"])
def test_a_failure_half_way_leaves_the_model_as_it_was(llama, monkeypatch, where):
    llama.model.norm.weight.requires_grad_(False)
    before, modules = state(llama), list(llama.named_modules())
    flags = [p.requires_grad for p in llama.parameters()]
    calls = []

    def failing(original):
        def run(*args, **kwargs):
            calls.append(args)
            if len(calls) > 3:
                raise RuntimeError("out of luck")
            return original(*args, **kwargs)

        return run

    if where == "create":
        monkeypatch.setattr(Lora, "create", failing(Lora.create))
    else:
        monkeypatch.setattr(nn.init, "kaiming_uniform_", failing(nn.init.kaiming_uniform_))
    config = LoraConfig(target_modules="all-linear", modules_to_save=["norm"])
    with pytest.raises(RuntimeError, match="out of luck"):
        deltaw.get_peft_model(llama, config)
    assert same_state(llama, before)
    assert list(llama.named_modules()) == modules  # the very objects, in their order
    assert [p.requires_grad for p in llama.parameters()] == flags


def test_a_failing_second_adapter_leaves_the_first(llama, monkeypatch):
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj", "v_proj"]))
    before = [(n, p, p.requires_grad) for n, p in model.named_parameters()]
    draws = []

    def fail_late(*args, **kwargs):
        draws.append(args)
        if len(draws) > 2:
            raise RuntimeError("out of luck")

    monkeypatch.setattr(nn.init, "zeros_", fail_late)
    with pytest.raises(RuntimeError, match="out of luck"):
        model.add_adapter("b", LoraConfig(target_modules="all-linear"))
    after = [(n, p, p.requires_grad) for n, p in model.named_parameters()]
    assert [(n, id(p), flag) for n, p, flag in after] == [(n, id(p), flag) for n, p, flag in before]
    assert list(model.peft_config) == ["default"]
    assert all("b" not in host.scaling for _, host in host_layers(model))


def test_lora_bias_needs_a_bias_and_says_which_layer(llama):
    before = state(llama)
    with pytest.raises(ConfigError, match=r"lora_bias=True, but 'model.layers.0.self_attn.q_proj' has no bias"):
        deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"], lora_bias=True))
    assert same_state(llama, before)
    assert all(p.requires_grad for p in llama.parameters())


def test_removal_gives_the_plain_layers_back(llama):
    before, modules = state(llama), list(llama.named_modules())
    inject(llama, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]), "a")
    assert isinstance(llama.model.layers[0].mlp.up_proj, HostLayer)
    remove_adapter(llama, "a")
    assert list(llama.named_modules()) == modules
    assert same_state(llama, before)


def test_the_mode_of_the_model_is_kept(llama):
    """A new dropout starts in training mode, which would drop inputs of a model in evaluation."""
    config = LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = deltaw.get_peft_model(llama.eval(), config)
    assert not any(module.training for module in model.modules())
    model.train().add_adapter("b", config)
    assert all(module.training for module in model.modules())
    model.eval().add_adapter("c", config)
    assert not any(module.training for module in model.modules())


def test_what_the_user_thawed_stays_trainable_until_the_next_injection(llama):
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    llama.model.norm.weight.requires_grad_(True)
    model.set_adapter("default")
    assert llama.model.norm.weight.requires_grad


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "-a", "a" * 65, "a b", "ä", "keys", "type", "training", None])
def test_bad_adapter_names(name):
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AdapterError, match="adapter name"):
        deltaw.inject_adapter_in_model(LoraConfig(target_modules=["0"]), net, adapter_name=name)
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("name", ["a", "0", "A-b_c", "a" * 64])
def test_good_adapter_names(name):
    net = nn.Sequential(nn.Linear(2, 2))
    deltaw.inject_adapter_in_model(LoraConfig(target_modules=["0"]), net, adapter_name=name)
    assert name in net[0].lora_A


def test_meta_device_on_request():
    net = nn.Sequential(nn.Linear(2, 2))
    config = LoraConfig(target_modules=["0"], lora_dropout=0.1)
    deltaw.inject_adapter_in_model(config, net, low_cpu_mem_usage=True)
    assert net[0].lora_A["default"].weight.is_meta
    assert not net[0].weight.is_meta


def test_a_config_of_peft_is_refused_with_the_cure(llama):
    with pytest.raises(ConfigError, match=r"peft_config is a peft\..*LoraConfig; use deltaw's own, deltaw.LoraConfig"):
        deltaw.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))


def test_targets_that_match_nothing_change_nothing(llama):
    before = state(llama)
    with pytest.raises(TargetError):
        deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj", "nope"]))
    assert same_state(llama, before)
    assert all(p.requires_grad for p in llama.parameters())


def test_an_offloaded_layer_is_refused_by_name(llama):
    llama.model.layers[1].mlp.up_proj._hf_hook = SimpleNamespace(offload=True)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*offloaded"):
        deltaw.get_peft_model(llama, LoraConfig(target_modules="all-linear"))
    assert not list(host_layers(llama))


def test_adapters_that_cannot_be_active_together_are_refused_before_anything_changes(llama):
    """The layers before the one that objects would be switched over already."""
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.merge_adapter()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError, match="only one can be active"):
        model.set_adapter(["b", "default"])
    assert same_state(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert {tuple(host.active_adapters) for _, host in host_layers(model)} == {("default",)}
    assert {tuple(host.merged_adapters) for _, host in host_layers(model)} == {("default",)}


def test_the_prefix_is_that_of_the_method_that_is_left(llama):
    """TRL and others ask for it; a refused adapter must not leave its own."""
    model = deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("b", deltaw.LoHaConfig(target_modules=["q_proj"]))
    assert model.base_model.prefix == "hada_"
    model.delete_adapter("b")
    assert model.base_model.prefix == "lora_"
