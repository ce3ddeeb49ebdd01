"""DoRA on linear layers: the formula, the start, PEFT's numbers, names and files; when the norm is computed."""

import copy
import math

import hypothesis.strategies as st
import peft
import pytest
import torch
from architectures import ARCHITECTURES, build
from hypothesis import given, settings
from peer import ATTENTION, close, gradients, logits, pair, stir
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import Linear, adapters_named, host_layers
from deltaw.adapters.methods.dora import Dora
from deltaw.errors import AdapterError, ConfigError

ALL = {"use_dora": True, "target_modules": "all-linear", "r": 4}
pytestmark = pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")


def hosted(host, method, name="a", **fields):
    host.add(method, name, LoraConfig(use_dora=True, **fields), "layer")
    host.set_active([*host.active_adapters, name])
    return host


def dora(in_features=6, out_features=5, dtype=torch.float32, bias=True, **fields) -> Linear:
    return hosted(Linear(nn.Linear(in_features, out_features, bias=bias, dtype=dtype)), Dora, **fields)


def shaken(host, size=0.3):
    with torch.no_grad():
        for adapter in host.adapters.values():
            for parameter in adapter.parameters():
                parameter += size * torch.randn_like(parameter)
    return host


# --- the formula --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    r=st.integers(1, 16),
    alpha=st.one_of(st.integers(-20, 64), st.floats(0.1, 50)),
    rslora=st.booleans(),
    lead=st.lists(st.integers(1, 3), max_size=3),
    bias=st.booleans(),
)
def test_the_update_is_the_formula_and_merging_is_the_forward(shape, r, alpha, rslora, lead, bias):
    host = shaken(dora(*shape, torch.float64, bias, r=r, lora_alpha=alpha, use_rslora=rslora))
    A, B, m = host.lora_A["a"].weight, host.lora_B["a"].weight, host.lora_magnitude_vector["a"].weight
    s = alpha / (math.sqrt(r) if rslora else r)
    direction = host.weight + s * (B @ A)
    weight = m[:, None] * direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    adapter = host.adapters["a"]
    tolerance = 1e-6 * weight.abs().max().item()
    assert torch.allclose(host.weight + adapter.delta_weight(), weight, atol=tolerance)
    x = torch.randn(*lead, shape[0], dtype=torch.float64)
    out = host(x)
    expected = nn.functional.linear(x, weight, host.bias)
    scale = 1 + x.abs().max().item() * shape[0]
    assert torch.allclose(out, expected, atol=tolerance * scale)
    assert torch.allclose(adapter.forward(x, host.base_layer(x)), expected, atol=tolerance * scale)
    before = host.weight.detach().clone()
    host.merge(["a"])
    assert torch.allclose(host(x), out, atol=tolerance * scale)
    host.unmerge()
    assert torch.equal(host.weight, before)


def plain(host, x):
    """The paper's formula with a detached norm, for autograd to differentiate."""
    f = host.adapters["a"]
    direction = host.weight + f.scaling * f.lora_B @ f.lora_A
    norm = torch.linalg.vector_norm(direction, dim=1).detach()
    return f.magnitude / norm * (x @ direction.T) + host.bias


def test_gradients_are_autograd_s_of_the_plain_formula():
    host = shaken(dora(dtype=torch.float64, r=3))
    host.weight.requires_grad_(False)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, host.bias, *host.adapters["a"].parameters()]
    for ours, expected in zip(
        torch.autograd.grad(host(x).sin().sum(), inputs),
        torch.autograd.grad(plain(host, x).sin().sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, expected)


def test_dropout_drops_nothing_of_the_base():
    """With B = 0 the output is the base's whatever is dropped; with an update its mean is the full one."""
    torch.manual_seed(0)
    host, x = dora(64, 8, lora_dropout=0.5, r=4).train(), torch.randn(16, 64)
    assert torch.equal(host(x), host.base_layer(x))
    shaken(host, 0.05)
    full = host.eval()(x)
    outs = torch.stack([host.train()(x) for _ in range(400)])
    assert not torch.equal(outs[0], outs[1])
    assert (outs.mean(0) - full).abs().mean() < 0.15 * (full - host.base_layer(x)).abs().mean()


# --- the start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "lora_dropout": 0.1}, {"init_lora_weights": "gaussian"}])
def test_the_start_is_the_base_bitwise(make_llama, ids, dtype, cast, fields):
    base = logits(make_llama(dtype, bias=True), ids)
    config = LoraConfig(**ALL, **fields)
    model = deltaw.get_peft_model(make_llama(dtype, bias=True), config, autocast_adapter_dtype=cast)
    assert torch.equal(logits(model, ids), base)
    out = model.train()(input_ids=ids).logits
    assert torch.equal(out.float(), base)
    out.sum().backward()  # and the first step is not lost on a magnitude
    grads = [adapter.magnitude.grad for adapter in adapters_named(model, "default").values()]
    assert all(grad.any() and torch.isfinite(grad).all() for grad in grads)
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.merge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_and_starts_as_its_base(name, tmp_path):
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    base = build(name)
    start = logits(base, ids)
    model = deltaw.get_peft_model(base, LoraConfig(**{**ALL, "r": 2}, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, ids), start)
    stir(model)
    assert all(bool(grad.any()) for grad in gradients(model, ids).values())
    trained = logits(model, ids)
    assert not close(trained, start, 1e-3)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(logits(back, ids), trained)
    assert close(logits(back.merge_and_unload(), ids), trained, 1e-5)


# --- PEFT -----------------------------------------------------------------------------------------------------------

FIELDS = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    {"target_modules": ATTENTION, "init_lora_weights": False},
    {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}, "bias": "lora_only"},
    {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False},
    {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_everything_is_peft_s(make_llama, ids, tmp_path, fields):
    ours, theirs = pair(lambda: make_llama(bias=True), use_dora=True, **fields)
    names = dict(theirs.named_parameters())
    assert [name for name, _ in ours.named_parameters()] == list(names)
    for name, parameter in ours.named_parameters():
        assert parameter.shape == names[name].shape
        assert parameter.requires_grad == names[name].requires_grad
        assert close(parameter, names[name]) if "magnitude" in name else torch.equal(parameter, names[name])
    assert any(name.endswith("lora_magnitude_vector.default.weight") for name in names)
    stir(ours), stir(theirs)
    assert close(logits(ours, ids), logits(theirs, ids))
    mine, peers = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == peers.keys()
    for name in mine:
        assert close(mine[name], peers[name], 5e-5), name

    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert any(key.endswith(".lora_magnitude_vector") for key in files[0])
    read = PeftModel.from_pretrained(make_llama(bias=True), tmp_path / "theirs")
    assert torch.equal(logits(read, ids), logits(ours.eval(), ids)) or close(logits(read, ids), logits(theirs, ids))
    there = peft.PeftModel.from_pretrained(make_llama(bias=True), tmp_path / "ours")
    assert close(logits(there, ids), logits(ours, ids))

    merged, peer = ours.merge_and_unload(), theirs.merge_and_unload()
    for (name, a), (_, b) in zip(merged.named_parameters(), peer.named_parameters(), strict=True):
        assert close(a, b), name


def test_several_at_once_are_peft_s(make_llama, ids):
    """The second scales what the first gave, by the norm over the bare base."""
    models = []
    for library in (deltaw, peft):
        torch.manual_seed(0)
        model = library.get_peft_model(make_llama(bias=True), library.LoraConfig(**ALL))
        model.add_adapter("b", library.LoraConfig(**{**ALL, "target_modules": ATTENTION, "r": 2}))
        model.add_adapter("c", library.LoraConfig(target_modules=["q_proj"]))
        (model if library is deltaw else model.base_model).set_adapter(["default", "b", "c"])
        models.append(stir(stir(stir(model), adapter="b"), adapter="c"))
    ours, theirs = models
    out = logits(ours, ids)
    assert close(out, logits(theirs, ids))
    mine, peers = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == peers.keys()
    assert all(close(mine[name], peers[name], 5e-5) for name in mine)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    ours.merge_adapter(["default"])
    ours.merge_adapter(["b", "c"])
    assert close(logits(ours, ids), out, 1e-5)
    ours.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
    ours.merge_adapter(["default", "b", "c"])
    theirs.merge_adapter(["default", "b", "c"])
    peers = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert close(p, peers[name], 1e-5), name


def test_a_mixed_batch_gives_each_row_its_own(make_llama):
    """Beside PiSSA, plain LoRA and the bare base; in training too."""
    ids = torch.randint(3, 128, (4, 9), generator=torch.Generator().manual_seed(1))
    model = deltaw.get_peft_model(make_llama(bias=True), LoraConfig(**ALL))
    model.add_adapter("p", LoraConfig(target_modules="all-linear", r=4, init_lora_weights="pissa"))
    model.add_adapter("l", LoraConfig(target_modules="all-linear", r=4))
    for name in ("default", "p", "l"):
        stir(model, adapter=name)
    names = ["default", "p", "l", "__base__"]
    for row, out in enumerate(model(input_ids=ids, adapter_names=names).logits):
        if names[row] == "__base__":
            with model.disable_adapter():
                alone = logits(model, ids[row : row + 1])
        else:
            model.set_adapter(names[row])
            alone = logits(model, ids[row : row + 1])
        assert close(out, alone[0])
    model.set_adapter("default")
    expected = gradients(model, ids[:1])
    model.zero_grad()
    out = model.train()(input_ids=ids, labels=torch.cat([ids[:1], torch.full_like(ids[1:], -100)]), adapter_names=names)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or close(parameter.grad, expected[name], 1e-5), name


def test_bf16_is_as_near_to_float32_as_peft_is(make_llama, ids):
    torch.manual_seed(0)
    reference = deltaw.get_peft_model(make_llama(torch.bfloat16).float(), LoraConfig(**ALL))
    torch.manual_seed(0)
    ours = deltaw.get_peft_model(make_llama(torch.bfloat16), LoraConfig(**ALL))
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make_llama(torch.bfloat16), peft.LoraConfig(**ALL))
    for (_, a), (_, b), (_, c) in zip(*(m.named_parameters() for m in (reference, ours, theirs)), strict=True):
        a.data = b.data.float().clone()
        c.data = b.data.clone()  # PEFT's own magnitude is rounded to bfloat16
    exact = logits(stir(reference), ids)
    errors = [(logits(stir(model), ids) - exact).abs().mean() for model in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]
    mine, peers, exact = (gradients(model, ids) for model in (ours, theirs, reference))
    for name in mine:
        assert mine[name].dtype == peers[name].dtype
        worst = max((grads[name].float() - exact[name]).abs().max() for grads in (peers,))
        assert (mine[name].float() - exact[name]).abs().max() <= 1.5 * worst + 0.01 * exact[name].abs().max(), name


# --- when the norm is computed --------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How often a norm, and the squares of a base, were computed."""
    times = {"compute_norm": 0, "squares": 0}

    def counting(name, compute):
        def count(self):
            times[name] += 1
            return compute(self)

        return count

    for name in times:
        monkeypatch.setattr(Dora, name, counting(name, getattr(Dora, name)))
    return times


def test_the_norm_is_computed_when_something_changed(counted):
    host, x = shaken(dora(bias=False).eval()), torch.randn(3, 6)
    host.weight.requires_grad_(False)

    def current():
        f = host.adapters["a"]
        direction = host.weight + f.scaling * f.lora_B @ f.lora_A
        norm = torch.linalg.vector_norm(direction, dim=1)
        with torch.no_grad():
            return torch.allclose(host(x), f.magnitude / norm * (x @ direction.T), atol=1e-6)

    assert current()
    counted.update(compute_norm=0, squares=0)
    for _ in range(3):
        assert current()
    assert counted == {"compute_norm": 0, "squares": 0}

    shaken(host)
    assert current()
    assert counted == {"compute_norm": 1, "squares": 0}
    with torch.no_grad():
        host.weight.mul_(1.5)
    assert current()
    assert counted == {"compute_norm": 2, "squares": 1}
    host.merge(["a"])
    host.unmerge()
    assert current()
    host.to(torch.float64).to(torch.float32)
    assert current()
    host.base_layer.weight.data = host.base_layer.weight.data * 0.5
    assert current()
    with torch.inference_mode():
        shaken(host)
        host(x)
    assert current()
    assert torch.autograd.grad(host(x).sum(), list(host.adapters["a"].parameters()))  # from what inference mode left


def test_a_forward_that_trains_computes_the_norm_even_if_no_change_was_seen(counted):
    """An optimizer may write behind autograd's back."""
    host, x = dora().train(), torch.randn(3, 6)
    host(x)
    with torch.no_grad():
        host(x)  # kept from here on
        host(x)
    counted.update(compute_norm=0)
    for times in (1, 2):
        for parameter in host.adapters["a"].parameters():
            parameter.data.add_(0.1)
        host(x)
        assert counted["compute_norm"] == times
    with torch.no_grad():
        before = host(x)
        assert counted["compute_norm"] == 3
    assert torch.equal(host(x), before)


def test_copies_are_independent(llama, ids):
    model = stir(deltaw.get_peft_model(llama, LoraConfig(**ALL)))
    out = logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), out)
    stir(twin)
    assert not torch.equal(logits(twin, ids), out)
    assert torch.equal(logits(model, ids), out)


# --- beside the rest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    host, x = shaken(dora(r=2)).train(), torch.randn(3, 6, requires_grad=True)
    grads = []
    for run in (host, lambda x: checkpoint(host, x, use_reentrant=reentrant)):
        host.zero_grad()
        x.grad = None
        run(x).sin().sum().backward()
        grads.append([x.grad, *(p.grad for p in host.adapters["a"].parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("train", [True, False])
def test_compiles_whole(train):
    host, x = shaken(dora(r=2)).train(train), torch.randn(3, 6)
    compiled = torch.compile(host, fullgraph=True, backend="aot_eager")
    parameters = list(host.adapters["a"].parameters())
    expected, out = host(x), compiled(x)
    assert torch.allclose(out, expected, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), parameters) for y in (out, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    shaken(host)
    assert torch.allclose(compiled(x), host(x), atol=1e-5)


def test_autocast_and_a_change_of_dtype(llama, ids):
    model = stir(deltaw.get_peft_model(llama, LoraConfig(**ALL)))
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
    assert close(out.logits.float(), exact, 0.03)
    assert close(logits(model, ids), exact)  # the norm that autocast left is not a rounded one
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert close(logits(model.to(torch.bfloat16), ids), exact, 0.03)


@pytest.mark.parametrize("low", [True, False])
def test_low_cpu_mem_usage(llama, make_llama, ids, tmp_path, low):
    model = stir(deltaw.get_peft_model(llama, LoraConfig(**ALL)))
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(make_llama(), tmp_path, low_cpu_mem_usage=low)
    assert not any(p.is_meta for p in back.parameters())
    assert torch.equal(logits(back, ids), logits(model, ids))


def test_on_the_meta_device_it_has_the_shapes(make_llama):
    with torch.device("meta"):
        base = make_llama()
    model = deltaw.get_peft_model(base, LoraConfig(**ALL))
    there = deltaw.get_peft_model(make_llama(), LoraConfig(**ALL))
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in there.named_parameters()
    ]


def test_what_cannot_be_is_refused(llama):
    with pytest.raises(ConfigError, match="lora_bias=True with use_dora=True"):
        LoraConfig(use_dora=True, lora_bias=True)
    model = deltaw.get_peft_model(llama, LoraConfig(**ALL))
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"use_dora=True on '.*q_proj' needs the base weight, and adapters"):
        model.add_adapter("b", LoraConfig(**ALL))
    with pytest.raises(AdapterError, match="needs the base weight"):
        next(iter(adapters_named(model, "default").values())).delta_weight()
    model.unmerge_adapter()
    model.add_adapter("b", LoraConfig(**ALL))
    assert {name for _, host in host_layers(model) for name in host.adapters} == {"default", "b"}


def test_a_row_of_zeros_in_the_base(ids):
    """A pruned output stays what it is, and poisons nothing (PEFT gives NaN)."""
    host, x = Linear(nn.Linear(6, 5)), torch.randn(3, 6)
    with torch.no_grad():
        host.weight[2] = 0
    shaken(hosted(host, Dora, r=2), 0)
    assert torch.equal(host(x), host.base_layer(x))
    host(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in host.adapters["a"].parameters())
