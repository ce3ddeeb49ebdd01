"""LoRA itself: the formula, the scalings, the start, and PEFT's numbers."""

import math

import hypothesis.strategies as st
import pytest
import torch
from architectures import ARCHITECTURES, build
from hypothesis import given, settings
from peer import ATTENTION, adapted, close, gradients, logits, pair, stir
from torch import nn

import deltaw
from deltaw import LoraConfig
from deltaw.adapters import Linear, Lora, host_layers


def lora(in_features=6, out_features=5, dtype=torch.float32, **fields) -> Linear:
    host = Linear(nn.Linear(in_features, out_features, dtype=dtype))
    host.add(Lora, "a", LoraConfig(**fields), "layer")
    host.set_active(["a"])
    return host


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    r=st.integers(1, 16),
    alpha=st.one_of(st.integers(-20, 64), st.floats(0.1, 50)),
    rslora=st.booleans(),
    batch=st.lists(st.integers(1, 3), max_size=3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_update_is_the_formula_and_merging_is_the_forward(shape, r, alpha, rslora, batch, bias, dtype):
    fields = {"lora_alpha": alpha, "use_rslora": rslora, "init_lora_weights": False, "lora_bias": bias}
    host = lora(*shape, dtype=dtype, r=r, **fields)
    A, B = host.lora_A["a"].weight, host.lora_B["a"].weight
    s = alpha / (math.sqrt(r) if rslora else r)
    delta = host.adapters["a"].delta_weight()
    assert delta.shape == host.weight.shape
    assert torch.allclose(delta, s * (B @ A), rtol=1e-5, atol=1e-6)
    x = torch.randn(*batch, shape[0], dtype=dtype)
    expected = host.base_layer(x) + s * host.lora_B["a"](host.lora_A["a"](x))
    out, tolerance = host(x), 1e-5 * (1 + abs(s) * r)
    assert out.shape == (*batch, shape[1])
    assert torch.allclose(out, expected, atol=tolerance)
    before = host.weight.detach().clone()
    host.merge(["a"])
    assert torch.allclose(host(x), out, atol=tolerance)
    host.unmerge()
    assert torch.equal(host.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "lora_dropout": 0.1}, {"lora_bias": True, "bias": "all"}])
def test_the_start_is_the_base_bitwise(make_llama, ids, dtype, fields):
    base = logits(make_llama(dtype, bias=True), ids)
    model = deltaw.get_peft_model(make_llama(dtype, bias=True), LoraConfig(target_modules=ATTENTION, **fields))
    assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model.train(), ids), base)  # B is zero whatever the dropout draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False])
@pytest.mark.parametrize("cast", [True, False])
def test_one_seed_gives_peft_s_adapter(make_llama, dtype, init, cast):
    import peft

    fields = {"target_modules": "all-linear", "init_lora_weights": init, "lora_bias": False, "r": 4}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(make_llama(dtype), peft.LoraConfig(**fields), autocast_adapter_dtype=cast)
    torch.manual_seed(3)
    ours = deltaw.get_peft_model(make_llama(dtype), LoraConfig(**fields), autocast_adapter_dtype=cast)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert a.dtype == b.dtype == (torch.float32 if cast and "lora_" in name else dtype)
        assert torch.equal(a, b), name


FIELDS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    {
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3},
        "alpha_pattern": {"k_proj": 5},
    },
    {"target_modules": ATTENTION, "lora_bias": True, "bias": "lora_only"},
    {"target_modules": ATTENTION, "bias": "all", "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_forward_and_gradients_are_peft_s(make_llama, ids, fields):
    """float32: logits to 1e-6 of the largest, gradients to 5e-5: the products are summed in another order."""
    ours, theirs = pair(lambda: make_llama(bias=True), **fields)
    stir(ours), stir(theirs)
    assert not close(logits(ours, ids), logits(make_llama(bias=True), ids), 1e-2)
    assert close(logits(ours, ids), logits(theirs, ids))
    mine, peers = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == peers.keys()
    for name in mine:
        assert close(mine[name], peers[name], 5e-5), name


@pytest.mark.parametrize("cast", [True, False])
def test_bf16_is_as_near_to_float32_as_peft_is(make_llama, ids, cast):
    """Another rounding of the same numbers: within 2% of each other, and no farther from float32 than PEFT (x
    1.25)."""
    import peft

    def error(model):
        return (logits(stir(model), ids) - exact).abs().mean()

    fields = {"target_modules": "all-linear"}
    torch.manual_seed(0)
    reference = deltaw.get_peft_model(make_llama(torch.bfloat16).float(), LoraConfig(**fields))
    torch.manual_seed(0)
    ours = deltaw.get_peft_model(make_llama(torch.bfloat16), LoraConfig(**fields), autocast_adapter_dtype=cast)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make_llama(torch.bfloat16), peft.LoraConfig(**fields), autocast_adapter_dtype=cast)
    for (_, a), (_, b) in zip(reference.named_parameters(), ours.named_parameters(), strict=True):
        a.data = b.data.float().clone()
    exact = logits(stir(reference), ids)
    assert error(ours) <= 1.25 * error(theirs)
    assert close(logits(ours, ids), logits(theirs, ids), 0.02)
    grads, peers = gradients(ours, ids), gradients(theirs, ids)
    for name in grads:
        assert grads[name].dtype == peers[name].dtype
        assert close(grads[name].float(), peers[name].float(), 0.05), name


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    torch.manual_seed(0)
    host, x = lora(64, 8, lora_dropout=0.5, init_lora_weights=False, r=4), torch.randn(16, 64)
    assert not torch.equal(host.train()(x), host(x))
    assert torch.equal(host.eval()(x), host(x))
    base = host.base_layer(x)
    mean = torch.stack([host.train()(x) - base for _ in range(400)]).mean(0)
    assert (mean - (host.eval()(x) - base)).abs().mean() < 0.15 * (host(x) - base).abs().mean()


def test_dropout_gradients_use_the_mask_of_the_forward():
    """Where an input was dropped the gradient is zero too, so the directional derivative is exact for that
    mask."""
    torch.manual_seed(0)
    host = lora(8, 8, torch.float64, lora_dropout=0.5, init_lora_weights=False, r=2).train()
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    out = host(x)
    (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (grad_A,) = torch.autograd.grad(out.sum(), host.lora_A["a"].weight)
    base = host.weight.sum(0)  # d base / dx, the same for each row
    pull = (host.lora_B["a"].weight @ host.lora_A["a"].weight).sum(0) * host.scaling["a"] * 2  # kept ones, over 1 - p
    kept = (grad - base).abs() > 1e-12
    assert 0 < kept.float().mean() < 1
    assert torch.allclose(grad - base, kept * pull)
    expected = host.lora_B["a"].weight.sum(0)[:, None] * (x * kept * 2).sum(0)[None] * host.scaling["a"]
    assert torch.allclose(grad_A, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_and_starts_as_its_base(name, tmp_path):
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    base = build(name)
    start = logits(base, ids)
    model = deltaw.get_peft_model(base, LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, ids), start)
    stir(model)
    grads = gradients(model, ids)
    assert len(grads) == 2 * len(adapted(model))
    assert all(bool(grad.any()) for grad in grads.values())
    trained = logits(model, ids)
    assert not close(trained, start, 1e-3)
    model.save_pretrained(tmp_path)
    back = deltaw.PeftModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(logits(back, ids), trained)
    assert close(logits(back.merge_and_unload(), ids), trained, 1e-5)


def test_autocast_runs_in_bf16(llama, ids):
    model = stir(deltaw.get_peft_model(llama, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])))
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, labels=ids)
        assert out.logits.dtype == torch.bfloat16
        out.loss.backward()
    assert close(out.logits.float(), exact, 0.03)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_whole_model_changes_dtype(llama, ids, dtype):
    model = stir(deltaw.get_peft_model(llama, LoraConfig(target_modules="all-linear", modules_to_save=["norm"])))
    exact = logits(model, ids)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert close(logits(model, ids), exact, 0.03 if dtype == torch.bfloat16 else 1e-5)


def test_two_active_adapters_add_up_with_each_its_own_scale(llama, ids):
    model = stir(deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"], lora_alpha=4)))
    model.add_adapter("b", LoraConfig(target_modules=["q_proj", "v_proj"], use_rslora=True, r=2))
    stir(model, adapter="b")
    model.set_adapter(["default", "b"])
    name, host = next(host_layers(model))
    x = torch.randn(2, 32)
    updates = sum(adapter.delta_weight() for adapter in host.adapters.values())
    assert torch.allclose(host(x), host.base_layer(x) + x @ updates.T, atol=1e-5), name
