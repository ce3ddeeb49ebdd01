"""How A and B start: draws and decompositions, the base left alone, and both forms of file, beside PEFT."""

import copy
import json
import math

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import given, settings
from peer import ATTENTION, close, gradients, logits, pair, same_state, state, stir
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import Linear, Lora, adapters_named
from deltaw.adapters.methods.init import decomposition, initialisers, known_initialiser, olora, orthogonal, pissa
from deltaw.checkpoint import load_tensors, read_tensors
from deltaw.errors import AdapterError, CheckpointError, ConfigError
from deltaw.statedict import get_peft_model_state_dict, set_peft_model_state_dict

TAKEN = ["pissa", "pissa_niter_4", "olora"]
REPEATABLE = ["pissa", "olora"]
ALL = {"target_modules": "all-linear", "r": 4}
pytestmark = [
    # PEFT's, about the base that it changes
    pytest.mark.filterwarnings("ignore:.*path_initial_model_for_weight_conversion.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


def adapter_of(model, name="default"):
    return next(iter(adapters_named(model, name).values()))


# --- the functions --------------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    cut=st.integers(0, 11),
    scaling=st.floats(0.1, 5),
    seed=st.integers(0, 99),
)
def test_what_is_taken_is_a_part_of_the_weight(shape, cut, scaling, seed):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    most = min(shape)
    r = 1 + cut % most
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    A, B = pissa(weight, r, scaling)
    assert (A.shape, B.shape) == ((r, shape[1]), (shape[0], r))
    assert torch.allclose(scaling * B @ A, U[:, :r] * S[:r] @ Vt[:r])  # the best of that rank
    assert torch.allclose(A @ A.T, torch.diag(S[:r]) / scaling, atol=1e-9)  # shared evenly by both
    assert torch.allclose(B.T @ B, torch.diag(S[:r]) / scaling, atol=1e-9)
    A, B = olora(weight, r, scaling)
    assert (A.shape, B.shape) == ((r, shape[1]), (shape[0], r))
    assert torch.allclose(B.T @ B, torch.eye(r, dtype=torch.float64))
    assert torch.allclose(A, B.T @ weight, atol=1e-9)  # the part of W in the span of its first columns
    assert torch.allclose((B @ A)[:, :r], weight[:, :r])


def test_the_fast_svd_finds_what_is_there_to_find():
    torch.manual_seed(0)
    weight = torch.randn(40, 3) @ torch.randn(3, 30)
    fast = decomposition("pissa_niter_8")
    assert fast is not None
    A, B = fast(weight, 3, 2.0)
    assert close(2.0 * B @ A, weight, 1e-5)


def test_orthogonal_starts_with_a_product_of_zero():
    torch.manual_seed(0)
    A, B = nn.Linear(20, 6, bias=False), nn.Linear(6, 10, bias=False)
    orthogonal(A, B)
    assert A.weight.abs().mean() > 0.01
    assert B.weight.abs().mean() > 0.01
    assert (B.weight @ A.weight).abs().max() < 1e-7
    with pytest.raises(ConfigError, match="r=3 must be even"):
        orthogonal(nn.Linear(20, 3), nn.Linear(3, 10))


def test_names():
    assert all(known_initialiser(name) for name in (*initialisers(), True, False, "pissa_niter_16"))
    assert not any(known_initialiser(name) for name in ("pissa_niter_", "pissa_niter_x", "PiSSA", "eva"))
    with pytest.raises(ConfigError, match=r"'pisa': use True, False or gaussian.*did you mean.*pissa"):
        LoraConfig(init_lora_weights="pisa")
    for name in ("pissa", "gaussian"):
        with pytest.raises(ConfigError, match=f"lora_bias=True with init_lora_weights='{name}'"):
            LoraConfig(init_lora_weights=name, lora_bias=True)


# --- the start, and the base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [*TAKEN, "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_start_is_the_base(make_llama, ids, init, dora):
    """float32: to 1e-6 of the largest logit. bfloat16: what is taken off cancels bit for bit on the processors tried,
    and PEFT's start, whose base was rounded again, is off by tenths of a percent."""
    config = LoraConfig(**ALL, init_lora_weights=init, use_dora=dora)
    base = logits(make_llama(bias=True), ids)
    model = deltaw.get_peft_model(make_llama(bias=True), config)
    assert close(logits(model, ids), base, 1e-6)
    half = logits(make_llama(torch.bfloat16, bias=True), ids)
    for cast in (True, False):
        model = deltaw.get_peft_model(make_llama(torch.bfloat16, bias=True), config, autocast_adapter_dtype=cast)
        theirs = peft.get_peft_model(
            make_llama(torch.bfloat16, bias=True),
            peft.LoraConfig(**ALL, init_lora_weights=init, use_dora=dora),
            autocast_adapter_dtype=cast,
        )
        off = (logits(model, ids) - half).abs().mean()
        if init == "orthogonal":  # BA = 0 until A and B are rounded
            assert off <= 0.005 * half.abs().max()
        else:
            assert off <= 0.1 * (logits(theirs, ids) - half).abs().mean()


@pytest.mark.parametrize("init", TAKEN)
def test_the_base_is_never_changed(make_llama, ids, init):
    model = make_llama(bias=True)
    before, base = state(model), logits(model, ids)

    def bare(model):
        return {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora_" not in name}

    ours = deltaw.get_peft_model(model, LoraConfig(**ALL, init_lora_weights=init))
    stir(ours)
    ours.add_adapter("plain", LoraConfig(**ALL))
    with ours.disable_adapter():
        assert torch.equal(logits(ours, ids), base)
    ours.set_adapter("plain")
    assert torch.equal(logits(ours, ids), base)  # its B is zero, and it stands on the base itself
    now = bare(model)
    assert all(torch.equal(now[name], before[name]) for name in before)
    ours.set_adapter(["default", "plain"])
    out = logits(ours, ids)
    ours.merge_adapter()
    assert close(logits(ours, ids), out, 1e-5)
    ours.unmerge_adapter()
    ours.delete_adapter("plain")
    assert same_state(ours.unload(), before)


@pytest.mark.parametrize("init", TAKEN)
def test_at_the_start_there_is_nothing_to_merge(make_llama, init):
    model = make_llama()
    before = state(model)
    merged = deltaw.get_peft_model(model, LoraConfig(**ALL, init_lora_weights=init)).merge_and_unload()
    assert same_state(merged, before)


def test_dropout_takes_nothing_off_the_base():
    """PEFT drops inputs of the principal part too, which it has taken out of the base."""
    torch.manual_seed(0)
    host = Linear(nn.Linear(64, 16))
    host.add(Lora, "a", LoraConfig(r=8, init_lora_weights="pissa", lora_dropout=0.5), "layer")
    host.set_active(["a"])
    x = torch.randn(8, 64)
    assert close(host.train()(x), host.base_layer(x), 1e-5)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(2, 10), st.integers(2, 10)),
    init=st.sampled_from(REPEATABLE),
    alpha=st.floats(0.5, 20),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_update_is_what_has_moved_since(shape, init, alpha, rslora, dtype):
    host = Linear(nn.Linear(*shape, dtype=dtype))
    config = LoraConfig(r=2, lora_alpha=alpha, use_rslora=rslora, init_lora_weights=init)
    host.add(Lora, "a", config, "layer")
    host.set_active(["a"])
    adapter = host.adapters["a"]
    assert not adapter.delta_weight().any()
    A, B = host.lora_A["a"].weight, host.lora_B["a"].weight
    start = s = alpha / (math.sqrt(2) if rslora else 2)
    start = s * (B @ A).detach()
    with torch.no_grad():
        A += 0.1 * torch.randn_like(A)
        B += 0.1 * torch.randn_like(B)
    delta = s * (B @ A) - start
    assert torch.allclose(adapter.delta_weight(), delta, atol=1e-5)
    x = torch.randn(3, shape[0], dtype=dtype)
    assert torch.allclose(host(x), host.base_layer(x) + x @ delta.T, atol=1e-4)
    assert torch.allclose(adapter.forward(x, host.base_layer(x)), host(x), atol=1e-4)


# --- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", TAKEN)
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "r": 4, "lora_alpha": 6},
        {"target_modules": ATTENTION, "use_rslora": True, "modules_to_save": ["lm_head"]},
        {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
        {"target_modules": ATTENTION, "use_dora": True, "r": 3},
    ],
    ids=str,
)
def test_everything_is_peft_s(make_llama, ids, init, fields):
    """Its base holds W - s B0 A0, ours W; the sums agree."""
    ours, theirs = pair(lambda: make_llama(bias=True), init_lora_weights=init, **fields)
    peers = dict(theirs.named_parameters())
    assert [name for name, _ in ours.named_parameters()] == list(peers)
    for name, p in ours.named_parameters():
        assert p.requires_grad == peers[name].requires_grad
        assert p.dtype == peers[name].dtype
        if "lora_" in name:
            assert close(p, peers[name], 1e-5), name
    for path, adapter in adapters_named(ours.get_base_model(), "default").items():
        base = dict(theirs.base_model.model.named_modules())[path].base_layer.weight
        taken = adapter.scaling * adapter.start.B @ adapter.start.A
        assert close(adapter.host.weight - taken, base, 1e-5)
    stir(ours), stir(theirs)
    assert close(logits(ours, ids), logits(theirs, ids), 1e-5)
    mine, others = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == others.keys()
    assert all(close(mine[name], others[name], 5e-5) for name in mine)
    merged, peer = ours.merge_and_unload(), theirs.merge_and_unload()
    for a, b in zip(merged.parameters(), peer.parameters(), strict=True):
        assert close(a, b, 1e-5)


class Turned(nn.Module):
    """GPT-2's kind of linear layer, which keeps its weight (in, out)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = Conv1D(5, 8)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_a_weight_that_is_kept_transposed(init):
    fields = {"target_modules": ["layer"], "r": 3, "init_lora_weights": init, "fan_in_fan_out": True}
    ours, theirs = pair(Turned, **fields)
    x = torch.randn(4, 8)
    assert close(ours(x), Turned()(x))
    stir(ours), stir(theirs)
    assert close(ours(x), theirs(x), 1e-5)


def test_olora_of_a_weight_that_is_kept_transposed():
    """PEFT decomposes the transpose, whose factors do not fit the layer."""
    ours = deltaw.get_peft_model(Turned(), LoraConfig(target_modules=["layer"], r=3, init_lora_weights="olora"))
    x = torch.randn(4, 8)
    assert close(ours(x), Turned()(x))
    out = stir(ours)(x)
    assert close(ours.merge_and_unload()(x), out, 1e-5)


# --- files ----------------------------------------------------------------------------------------------------------

FIELDS = [
    {"target_modules": "all-linear", "r": 4, "lora_alpha": 6},
    {"target_modules": ATTENTION, "use_rslora": True, "modules_to_save": ["lm_head"]},
    {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    {"target_modules": ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    {"target_modules": ATTENTION, "use_dora": True, "r": 3},
    {"target_modules": ["q_proj", "embed_tokens"], "r": 3},
]


@pytest.mark.parametrize("init", TAKEN)
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_what_is_saved_is_lora_of_twice_the_rank(make_llama, ids, tmp_path, init, fields):
    torch.manual_seed(0)
    model = deltaw.get_peft_model(make_llama(bias=True), LoraConfig(init_lora_weights=init, **fields))
    out = logits(stir(model), ids)
    held = {name: config.to_dict() for name, config in model.peft_config.items()}
    model.save_pretrained(tmp_path)
    assert {name: config.to_dict() for name, config in model.peft_config.items()} == held
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["init_lora_weights"] is True
    assert written["r"] == 2 * fields.get("r", 8)
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    r = fields.get("rank_pattern", {}).get("q_proj", fields.get("r", 8))
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (2 * r, 32)
    assert ("base_model.model.lm_head.weight" in shapes) == ("modules_to_save" in fields)
    assert not any("lora_start" in key for key in shapes)
    for library in (deltaw, peft):
        read = library.PeftModel.from_pretrained(make_llama(bias=True), tmp_path)
        assert close(logits(read, ids), out, 1e-5)


@pytest.mark.parametrize("init", REPEATABLE)
@pytest.mark.parametrize("fields", FIELDS[:3], ids=str)
def test_the_unconverted_form_is_peft_s(make_llama, ids, tmp_path, init, fields):
    """Written by either, it is read by either, each of which decomposes its base again."""
    ours, theirs = pair(lambda: make_llama(bias=True), init_lora_weights=init, **fields)
    out = logits(stir(ours), ids)
    stir(theirs)
    ours.save_pretrained(tmp_path / "ours", convert_to_lora=False)
    theirs.save_pretrained(tmp_path / "theirs")
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for field in ("init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        assert configs[0][field] == configs[1][field]
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: t.shape for k, t in files[0].items()} == {k: t.shape for k, t in files[1].items()}
    for who in ("ours", "theirs"):
        assert close(logits(PeftModel.from_pretrained(make_llama(bias=True), tmp_path / who), ids), out, 1e-5)
        assert close(logits(peft.PeftModel.from_pretrained(make_llama(bias=True), tmp_path / who), ids), out, 1e-5)
    low = PeftModel.from_pretrained(make_llama(bias=True), tmp_path / "ours", low_cpu_mem_usage=True)
    assert torch.equal(logits(low, ids), out)  # the same decomposition of the same base
    assert not any(t.is_meta for t in low.state_dict().values())


def test_peft_s_conversion_is_read(make_llama, ids, tmp_path):
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(**ALL, init_lora_weights="pissa"))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    stir(theirs)
    theirs.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=tmp_path / "start")
    read = PeftModel.from_pretrained(make_llama(), tmp_path / "new")
    assert close(logits(read, ids), logits(theirs, ids), 1e-5)


def test_peft_s_way_to_ask_for_the_conversion(make_llama, tmp_path):
    model = stir(deltaw.get_peft_model(make_llama(), LoraConfig(**ALL, init_lora_weights="pissa")))
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=tmp_path / "none")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match="contradict"):
        model.save_pretrained(
            tmp_path / "c", path_initial_model_for_weight_conversion=tmp_path / "a", convert_to_lora=False
        )


def test_a_random_start_cannot_be_left_out_of_the_file(make_llama, ids, tmp_path):
    model = stir(deltaw.get_peft_model(make_llama(), LoraConfig(**ALL, init_lora_weights="pissa_niter_2")))
    with pytest.raises(CheckpointError, match="convert_to_lora=False: the start of init_lora_weights='pissa_niter_2'"):
        model.save_pretrained(tmp_path / "ours", convert_to_lora=False)
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(**ALL, init_lora_weights="pissa_niter_2"))
    theirs.save_pretrained(tmp_path / "theirs")
    base = make_llama()
    before = state(base)
    with pytest.raises(CheckpointError, match="init_lora_weights='pissa_niter_2': the file does not hold"):
        PeftModel.from_pretrained(base, tmp_path / "theirs")
    assert same_state(base, before)


@pytest.mark.parametrize("init", TAKEN)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_bitwise(make_llama, ids, tmp_path, init, dora, dtype):
    """Also where the start was drawn anew, as in a process that starts again."""
    config = LoraConfig(**ALL, init_lora_weights=init, use_dora=dora)
    model = stir(deltaw.get_peft_model(make_llama(dtype), config))
    model.save_pretrained(tmp_path)
    torch.manual_seed(1234)
    again = deltaw.get_peft_model(make_llama(dtype), config)
    load_tensors(again.get_base_model(), "default", again.peft_config["default"], read_tensors(tmp_path), "file")
    assert torch.equal(logits(again, ids), logits(model, ids))
    saved, now = model.state_dict(), again.state_dict()
    assert saved.keys() == now.keys()
    assert all(torch.equal(saved[name], now[name]) for name in saved)


def test_a_refused_file_leaves_the_start_alone(make_llama, tmp_path):
    config = LoraConfig(**ALL, init_lora_weights="pissa")
    stir(deltaw.get_peft_model(make_llama(), config)).save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path)
    model = deltaw.get_peft_model(make_llama(), config)
    before = state(model)
    key = next(key for key in tensors if key.endswith("v_proj.lora_B.weight"))
    for wrong in (tensors[key][:, :3], torch.full_like(tensors[key], math.nan)):
        with pytest.raises(CheckpointError, match=r"v_proj\.lora_B"):
            load_tensors(model, "default", config, {**tensors, key: wrong}, "file")
        assert same_state(model, before)
    with pytest.raises(CheckpointError, match=r"missing: .*v_proj\.lora_B"):
        load_tensors(model, "default", config, {k: t for k, t in tensors.items() if k != key}, "file")
    assert same_state(model, before)


@pytest.mark.parametrize("init", TAKEN)
def test_a_state_dict_holds_all_of_it(make_llama, ids, init):
    config = LoraConfig(**ALL, init_lora_weights=init)
    model = stir(deltaw.get_peft_model(make_llama(), config))
    torch.manual_seed(99)
    other = deltaw.get_peft_model(make_llama(), config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert not any("lora_start" in name for name, _ in model.named_parameters())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    stir(twin)
    assert torch.equal(logits(other, ids), logits(model, ids))
    exact = logits(model, ids)
    assert close(logits(model.to(torch.bfloat16), ids), exact, 0.03)


@pytest.mark.parametrize("gathered", [False, True])
def test_the_dictionary_of_an_adapter_holds_all_of_it(make_llama, ids, gathered):
    config = LoraConfig(**ALL, init_lora_weights="pissa_niter_2")
    model = stir(deltaw.get_peft_model(make_llama(), config))
    tensors = get_peft_model_state_dict(model, model.state_dict() if gathered else None)
    torch.manual_seed(99)
    other = deltaw.get_peft_model(make_llama(), config)
    set_peft_model_state_dict(other, tensors)
    assert torch.equal(logits(other, ids), logits(model, ids))


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"init_lora_weights": "pissa", "r": 17},
            r"'pissa' with r=17 on '.*k_proj', which is 16 x 32.*more than rank 16",
        ),
        ({"init_lora_weights": "olora", "r": 2, "rank_pattern": {"v_proj": 20}}, r"r=20 on '.*v_proj'"),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, "needs a positive lora_alpha"),
        ({"init_lora_weights": "orthogonal", "r": 2, "rank_pattern": {"k_proj": 3}}, "r=3 must be even"),
    ],
)
def test_refusals_name_the_layer_and_take_nothing(llama, fields, message):
    before = state(llama)
    with pytest.raises(ConfigError, match=message):
        deltaw.get_peft_model(llama, LoraConfig(target_modules=ATTENTION, **fields))
    assert same_state(llama, before)


def test_a_convolution_has_no_decomposition_here():
    with pytest.raises(ConfigError, match="init_lora_weights='pissa', which '0', a convolution, does not"):
        deltaw.get_peft_model(
            nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(target_modules=["0"], r=2, init_lora_weights="pissa")
        )


def test_a_base_that_others_are_merged_into_is_refused(llama):
    model = stir(deltaw.get_peft_model(llama, LoraConfig(**ALL)))
    model.merge_adapter()
    before = state(model)
    with pytest.raises(AdapterError, match=r"init_lora_weights='pissa' on '.*' needs the base weight, and adapters"):
        model.add_adapter("b", LoraConfig(**ALL, init_lora_weights="pissa"))
    assert same_state(model, before)


def test_on_the_meta_device_it_has_the_shapes(make_llama):
    with torch.device("meta"):
        base = make_llama()
    model = deltaw.get_peft_model(base, LoraConfig(**ALL, init_lora_weights="pissa"))
    start = adapter_of(model).start
    assert start.A.is_meta
    assert start.A.shape == (4, 32)
