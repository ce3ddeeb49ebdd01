"""Starts that change the base: LoftQ, and PiSSA and OLoRA over a quantized weight."""

from __future__ import annotations

import itertools
import json

import bnb
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import Holder
from peer import close, logits
from torch import Tensor, nn

import deltaw
from deltaw.adapters.methods.loftq import as_in_4bit
from deltaw.errors import AdapterError, ConfigError, MergeError, ModelError
from deltaw.quant import NF4Config, NF4Linear
from deltaw.weights import store_of

KINDS = {
    "nf4": NF4Config(),
    "nested": NF4Config(bnb_4bit_use_double_quant=True),
    "fp4": NF4Config(bnb_4bit_quant_type="fp4"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def weight(out: int = 96, width: int = 128, like: str = "trained") -> Tensor:
    """(out, in): normal, or like a trained one: a few strong directions and columns of unequal size under noise."""
    torch.manual_seed(0)
    noise = torch.randn(out, width)
    if like == "normal":
        return noise * 0.1
    strong = torch.randn(out, 6) @ torch.randn(6, width)
    return (noise + strong * 0.5) * (0.5 + torch.rand(width)) * 0.1


def held(W: Tensor, kind: str | None = "nf4") -> Holder:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight = nn.Parameter(W.clone())
    return Holder(layer if kind is None else NF4Linear.from_linear(layer, KINDS[kind]))


def adapted(W: Tensor, init: str, kind: str | None = "nf4", turns: int = 1, name: str = "default", **fields):
    fields = {"r": 8, "lora_alpha": 20, **fields}
    more = {"loftq_config": deltaw.LoftQConfig(loftq_iter=turns)} if init == "loftq" else {}
    config = deltaw.LoraConfig(target_modules=["layer"], init_lora_weights=init, **fields, **more)
    with deltaw.full_weights({"layer.weight": W}):
        return deltaw.get_peft_model(held(W, kind), config, adapter_name=name)


def host_of(model):
    return model.get_base_model().layer


def effective(model) -> Tensor:
    """Q + s B A."""
    host = host_of(model)
    return (host.store.dequantize() + host.adapters[host.active_adapters[0]].delta_weight()).detach()


def bits(layer: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in layer.state_dict().values()]


def same(layer: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), before, strict=True))


# --- nearer to the weight than its quantized self -----------------------------------------------------------


@kinds
@pytest.mark.parametrize("like", ["normal", "trained"])
@pytest.mark.parametrize(("r", "alpha"), [(1, 1), (4, 16), (8, 8), (16, 5), (32, 64)])
def test_the_error_falls_with_each_turn(kind, like, r, alpha):
    W = weight(like=like)
    errors = [(W - store_of(held(W, kind).layer).dequantize()).norm()]
    for turns in range(1, 6):
        model = adapted(W, "loftq", kind, turns, r=r, lora_alpha=alpha)
        errors.append((W - effective(model)).norm())
    assert errors[1] < 0.99 * errors[0]
    assert errors[2] < errors[1]
    assert all(after <= before for before, after in itertools.pairwise(errors)), errors


@settings(max_examples=25)
@given(
    out=st.integers(2, 40),
    width=st.integers(2, 70),
    r=st.integers(1, 2),
    alpha=st.integers(1, 9),
    rslora=st.booleans(),
    turns=st.integers(1, 3),
)
def test_one_turn_or_more_is_the_algorithm_of_the_paper(out, width, r, alpha, rslora, turns):
    """Algorithm 1, with bitsandbytes' quantization and a plain SVD; equal to PEFT's where alpha = r."""
    W = weight(out, width)
    model = adapted(W, "loftq", "nf4", turns, r=r, lora_alpha=alpha, use_rslora=rslora)
    rest, best = W, torch.inf
    for _ in range(turns):
        new_Q = bnb.dequantize(*bnb.quantize(rest))
        U, S, Vt = torch.linalg.svd(W - new_Q)
        new = U[:, :r] * S[:r] @ Vt[:r]
        rest = W - new
        if (rest - new_Q).norm() >= best:  # of a rank as large as the layer, all turns are alike
            break
        best, Q, product = (rest - new_Q).norm(), new_Q, new
    host = host_of(model)
    # a sum in another order may round a value that lies between two codes to the other one
    apart = (host.store.dequantize() != Q).float().mean()
    assert apart <= 0.02
    if not apart:
        assert close(host.adapters["default"].delta_weight().detach(), product, 1e-4)


@kinds
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_pissa_leaves_what_quantizes_better(kind, init):
    W = weight()
    plain = (W - store_of(held(W, kind).layer).dequantize()).norm()
    model = adapted(W, init, kind)
    host = host_of(model)
    assert (W - effective(model)).norm() < 0.8 * plain
    A, B = host.lora_A["default"].weight, host.lora_B["default"].weight
    residual = torch.addmm(W, B, A, alpha=-20 / 8).detach()
    assert torch.equal(host.store.dequantize(), store_of(held(residual, kind).layer).dequantize())
    if init == "pissa":  # the principal part of W itself, and not of its quantized self
        U, S, Vt = torch.linalg.svd(W)
        assert close((B @ A).detach() * 20 / 8, U[:, :8] * S[:8] @ Vt[:8], 1e-4)


def test_olora_takes_its_product_out():
    W = weight()
    model = adapted(W, "olora", lora_alpha=8)
    A, B = host_of(model).lora_A["default"].weight, host_of(model).lora_B["default"].weight
    assert close((B.T @ B).detach(), torch.eye(8), 1e-5)
    expected = store_of(held(torch.addmm(W, B, A, alpha=-1).detach()).layer).dequantize()
    assert torch.equal(host_of(model).store.dequantize(), expected)


def test_dora_s_magnitude_is_that_of_what_it_starts_over():
    W = weight()
    model = adapted(W, "loftq", use_dora=True)
    host = host_of(model)
    product = 20 / 8 * host.lora_B["default"].weight @ host.lora_A["default"].weight
    start = (host.store.dequantize() + product).detach()
    assert close(host.lora_magnitude_vector["default"].weight.detach(), start.norm(dim=1), 1e-5)
    x = torch.randn(20, 128)
    assert close(model(x).detach(), x @ start.T, 1e-5)


def test_on_a_dense_base_the_values_of_4_bits_stay_in_it():
    W = weight()
    model = adapted(W, "loftq", None, turns=3)
    values = host_of(model).weight.detach()
    assert torch.equal(values, as_in_4bit(values))
    assert all(len(block.unique()) <= 16 for block in values.view(-1, 64))
    assert (W - effective(model)).norm() < 0.95 * (W - as_in_4bit(W)).norm()
    with model.disable_adapter():
        assert torch.equal(host_of(model).weight, W)
    assert torch.equal(model.unload().layer.weight, W)


# --- the base that was given comes back ---------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("init", ["loftq", "pissa", "olora"])
def test_the_base_is_the_adapter_s_own_while_it_is_active(kind, init):
    W, x = weight(), torch.randn(20, 128)
    before = bits(held(W, kind).layer)
    model = adapted(W, init, kind, turns=2)
    layer, own = host_of(model).base_layer, bits(host_of(model).base_layer)
    out = model(x).detach()
    assert not same(layer, before)
    with model.disable_adapter():
        assert same(layer, before)
        assert torch.equal(model(x), held(W, kind)(x))
    assert same(layer, own)
    assert torch.equal(model(x), out)
    model.add_adapter("plain", deltaw.LoraConfig(r=2, target_modules=["layer"]))
    assert same(layer, own)
    model.set_adapter("plain")
    assert torch.equal(model(x), held(W, kind)(x))
    model.set_adapter("default")
    assert torch.equal(model(x), out)
    model.delete_adapter("default")
    assert same(layer, before)
    assert same(adapted(W, init, kind, turns=2).unload().layer, before)


def test_a_single_turn_leaves_a_base_that_was_quantized_so():
    """It is plain LoRA: others may run beside it."""
    W = weight()
    before = bits(held(W).layer)
    model = adapted(W, "loftq")
    assert same(host_of(model).base_layer, before)
    assert not host_of(model).bases
    model.add_adapter("plain", deltaw.LoraConfig(r=2, target_modules=["layer"]))
    model(torch.randn(2, 128), adapter_names=["default", "plain"])


def test_two_adapters_with_bases_of_their_own_take_turns():
    W, x = weight(), torch.randn(20, 128)
    model = adapted(W, "loftq", turns=2)
    alone = adapted(W, "pissa")(x)
    first = model(x)
    with deltaw.full_weights({"layer.weight": W}):
        model.add_adapter(
            "other", deltaw.LoraConfig(r=8, lora_alpha=20, target_modules=["layer"], init_lora_weights="pissa")
        )
    assert torch.equal(model(x), first)
    model.set_adapter("other")
    assert torch.equal(model(x), alone)
    with pytest.raises(MergeError, match="a base weight of their own"):
        model.merge_adapter(["default"])
    with pytest.raises(AdapterError, match="base weights of their own"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    model.set_adapter("default")
    assert torch.equal(model(x), first)


def test_merging_is_into_the_adapter_s_own_base():
    W, x = weight(), torch.randn(20, 128)
    before = bits(held(W).layer)
    model = adapted(W, "loftq", turns=3)
    model.add_adapter("plain", deltaw.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    model.set_adapter(["default", "plain"])
    own, out = bits(host_of(model).base_layer), model(x).detach()
    model.merge_adapter()
    host = host_of(model)
    assert host.merged_adapters == ["default", "plain"]
    model.unmerge_adapter(["default"])  # the other stays, and is one of the base that was given
    assert host.merged_adapters == ["plain"]
    model.unmerge_adapter()
    assert same(host.base_layer, own)
    with pytest.raises(MergeError, match="own"):
        model.merge_adapter(["plain"])
    assert torch.equal(model(x), out)
    with model.disable_adapter():
        assert same(host.base_layer, before)
    merged = model.merge_and_unload(dequantize=True)
    assert close(merged(x).detach(), out, 1e-5)


def test_a_failed_injection_leaves_the_base(make_llama):
    model = make_llama()
    weights = {k: v for k, v in model.state_dict().items() if "layers.1.self_attn.v_proj" not in k}
    deltaw.quantize_(model, NF4Config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = deltaw.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights="loftq")
    with deltaw.full_weights(weights), pytest.raises(ModelError, match=r"layers\.1\.self_attn\.v_proj"):
        deltaw.get_peft_model(model, config)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any("lora" in name for name, _ in model.named_modules())


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["loftq", "pissa", "olora"])
def test_a_file_means_the_base_that_its_reader_makes_again(init, make_llama, ids, tmp_path):
    dense, made = make_llama(), tmp_path / "adapter"
    dense.save_pretrained(tmp_path / "base")

    def quantized():
        model = type(dense).from_pretrained(tmp_path / "base")
        deltaw.quantize_(model, NF4Config(bnb_4bit_use_double_quant=True))
        return model

    config = deltaw.LoraConfig(target_modules="all-linear", r=4, lora_alpha=4, init_lora_weights=init)
    model = deltaw.get_peft_model(quantized(), config)  # reads the folder that the model came from
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += torch.randn_like(parameter) * 0.05
    model.save_pretrained(made)
    written = json.loads((made / "adapter_config.json").read_text())
    assert (written["r"], written["init_lora_weights"]) == (4, init)
    back = deltaw.PeftModel.from_pretrained(quantized(), made)
    assert torch.equal(logits(back, ids), logits(model, ids))
    if init != "loftq":
        # over a dense base the same file is over what W - s B0 A0 is there
        there = deltaw.PeftModel.from_pretrained(make_llama(), made)
        assert close(logits(there, ids), logits(model, ids), 0.3)


def test_an_adapter_over_its_own_base_is_not_refilled_with_one_over_another(tmp_path):
    W = weight()
    model, other = adapted(W, "pissa"), held(W)
    plain = deltaw.get_peft_model(other, deltaw.LoraConfig(r=8, lora_alpha=20, target_modules=["layer"]))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(AdapterError, match="init_lora_weights: True in the file, 'pissa' here"):
        model.load_adapter(tmp_path / "plain", "default")
    model.save_pretrained(tmp_path / "own")
    model.load_adapter(tmp_path / "own", "default")


def test_settings_are_peft_s(tmp_path):
    by_default = deltaw.LoraConfig(target_modules=["layer"], init_lora_weights="loftq")
    assert by_default.loftq_config == {"loftq_bits": 4, "loftq_iter": 1}
    for given_as in (deltaw.LoftQConfig(loftq_iter=3), {"loftq_iter": 3}):
        config = deltaw.LoraConfig(target_modules=["layer"], init_lora_weights="loftq", loftq_config=given_as)
        assert config.loftq_config == {"loftq_bits": 4, "loftq_iter": 3}
    config.save_pretrained(tmp_path)
    assert deltaw.PeftConfig.from_pretrained(tmp_path).loftq_config == config.loftq_config
    assert vars(peft.LoftQConfig()) == by_default.loftq_config  # what PEFT puts into its files


def test_settings_without_effect_are_told(caplog):
    config = deltaw.LoraConfig(target_modules=["layer"], loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    assert config.loftq_config == {}
    assert "no effect" in caplog.text


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"loftq_bits": 2}, "only 4 bits"), ({"loftq_iter": 0}, "positive"), ({"bits": 4}, "no setting of LoftQ")],
)
def test_settings_that_cannot_work_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        deltaw.LoraConfig(target_modules=["layer"], init_lora_weights="loftq", loftq_config=settings)


def test_without_full_weights_it_says_what_to_give():
    for init in ("loftq", "pissa", "olora"):
        with pytest.raises(ModelError, match=r"deltaw\.full_weights"):
            deltaw.get_peft_model(
                held(weight()), deltaw.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=init)
            )


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no more than rank 96"):
        adapted(weight(), "loftq", r=97)
