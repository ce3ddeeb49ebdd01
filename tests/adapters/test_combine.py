"""add_weighted_adapter: the eleven combinations beside PEFT's, what they keep, and what they refuse."""

import copy

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import given, settings
from peer import close, logits, pair, same_state, state, stir
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import deltaw
from deltaw import LoraConfig, PeftModel
from deltaw.adapters import COMBINATIONS, adapters_named, host_layers
from deltaw.errors import AdapterError

PEFT_SAYS = [
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
    "ignore:.*no modules were excluded:UserWarning",
    "ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning",
]
pytestmark = [pytest.mark.filterwarnings(warning) for warning in PEFT_SAYS]

PRUNING = [name for name, combination in COMBINATIONS.items() if combination.prunes]
RESOLVED = [name for name, combination in COMBINATIONS.items() if combination.decomposes]


def options(kind, **more):
    return {"combination_type": kind, **({"density": 0.6} if kind in PRUNING else {}), **more}


def both(build, *configs, seed=7):
    """(ours, PEFT's) with adapters "default", "b", "c", ... of equal weights."""
    ours, theirs = pair(build, seed, **configs[0])
    for name, config in zip("bcd", configs[1:], strict=False):
        for model, make in ((ours, LoraConfig), (theirs, peft.LoraConfig)):
            torch.manual_seed(seed)
            model.add_adapter(name, make(**copy.deepcopy(config)))
            stir(model, adapter=name)
    return stir(ours), stir(theirs)


def products(model, name="new"):
    """Layer -> what adapter ``name`` adds to its weight."""
    found = {}
    for path, module in model.named_modules():
        slots = [s for s in ("lora_A", "lora_embedding_A") if name in getattr(module, s, {})]
        if not slots:
            continue
        A, B = (getattr(module, slots[0].replace("_A", side))[name] for side in ("_A", "_B"))
        A, B = (getattr(side, "weight", side).detach() for side in (A, B))
        found[path] = B.flatten(1) @ A.flatten(1) * module.scaling[name]
    return found


def agree(ours, theirs, relative=1e-6):
    mine, peers = products(ours), products(theirs)
    assert mine.keys() == peers.keys()
    assert any(bool(update.any()) for update in mine.values())
    for path in mine:
        # rounding is relative to the terms of the product, of which the largest is at least the largest update
        assert close(mine[path], peers[path], relative), path


def twice(ours, theirs, adapters, weights, **fields):
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.add_weighted_adapter(adapters, weights, "new", **fields)


def same_config(ours, theirs, name="new"):
    mine, peers = ours.peft_config[name], theirs.peft_config[name]
    for field in (
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "lora_dropout",
        "modules_to_save",
    ):
        assert getattr(mine, field) == getattr(peers, field), field


A = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}
B = {"target_modules": ["v_proj", "up_proj"], "r": 4, "lora_alpha": 3}
C = {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, "lora_dropout": 0.1}


# --- as PEFT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_every_combination_is_peft_s(make_llama, ids, tmp_path, kind):
    """float32, to 1e-6 of the largest element, decompositions to 1e-5; then it is an adapter like any."""
    ours, theirs = both(make_llama, A, B, C)
    before, out = state(ours), logits(ours, ids)
    twice(ours, theirs, ["default", "b", "c"], [0.7, -0.4, 1.2], **options(kind))
    same_config(ours, theirs)
    agree(ours, theirs, 1e-5 if kind in RESOLVED else 1e-6)
    assert torch.equal(logits(ours, ids), out)  # not active yet
    assert ours.active_adapters == ["default"]
    assert all(torch.equal(ours.state_dict()[key], before[key]) for key in before)
    assert not any(p.requires_grad for n, p in ours.named_parameters() if ".new." in n)

    ours.set_adapter("new"), theirs.set_adapter("new")
    combined = logits(ours, ids)
    assert close(combined, logits(theirs, ids), 1e-5)
    ours.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path / "new"), ids), combined)
    assert close(logits(peft.PeftModel.from_pretrained(make_llama(), tmp_path / "new"), ids), combined, 1e-5)
    assert close(logits(ours.merge_and_unload(), ids), combined, 1e-5)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_the_weighted_sum_of_the_updates(make_llama, kind):
    """cat exactly, svd where the rank suffices: no peer needed."""
    ours, _ = both(make_llama, {**A, "use_rslora": True}, {**B, "r": 2}, C)
    weights = {"default": 0.7, "b": -0.4, "c": 2.0}
    ours.add_weighted_adapter(
        list(weights), list(weights.values()), "new", kind, svd_rank=10 if kind == "svd" else None
    )
    new = adapters_named(ours.get_base_model(), "new")
    assert len(new) == 6
    for path, host in host_layers(ours.get_base_model()):
        total = sum(w * host.adapters[n].delta_weight() for n, w in weights.items() if n in host.adapters)
        assert close(new[path].delta_weight(), total, 1e-5)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_ranks_that_differ_from_layer_to_layer(make_llama, ids, tmp_path, kind):
    pattern = {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"q_proj": 5}}
    ours, theirs = both(make_llama, {**A, **pattern}, {**A, **pattern, "lora_alpha": 2})
    twice(ours, theirs, ["default", "b"], [0.5, 0.5], **options(kind))
    same_config(ours, theirs)
    assert ours.peft_config["new"].r == (12 if kind == "cat" else 6)
    agree(ours, theirs, 1e-5 if kind in RESOLVED else 1e-6)
    # PEFT leaves factors there that are smaller than the config says, so its own file does not load
    ours.set_adapter("new")
    ours.save_pretrained(tmp_path, selected_adapters=["new"])
    here = PeftModel.from_pretrained(make_llama(), tmp_path / "new")
    there = peft.PeftModel.from_pretrained(make_llama(), tmp_path / "new")
    assert torch.equal(logits(here, ids), logits(ours, ids))
    assert close(logits(there, ids), logits(ours, ids), 1e-5)


@pytest.mark.parametrize("kind", ["svd", "cat", "ties_svd", "dare_linear_svd"])
def test_different_ranks(make_llama, kind):
    ours, theirs = both(make_llama, A, {**B, "r": 7}, {**C, "r": 2})
    twice(ours, theirs, ["default", "b", "c"], [0.5, 0.8, -0.2], **options(kind))
    same_config(ours, theirs)
    agree(ours, theirs, 1e-5)


@pytest.mark.parametrize("kind", RESOLVED)
@pytest.mark.parametrize("fields", [{"svd_rank": 2}, {"svd_clamp": 0.9}, {"svd_full_matrices": False}], ids=str)
def test_settings_of_the_decomposition(make_llama, kind, fields):
    ours, theirs = both(make_llama, A, B)
    twice(ours, theirs, ["default", "b"], [0.5, 0.8], **options(kind, **fields))
    same_config(ours, theirs)
    agree(ours, theirs, 2e-5)


@pytest.mark.parametrize("kind", PRUNING)
@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1:UserWarning")
def test_settings_of_the_pruning(make_llama, kind, density, majority):
    ours, theirs = both(make_llama, A, C)
    fields = {"combination_type": kind, "density": density, "majority_sign_method": majority}
    twice(ours, theirs, ["default", "b"], [0.5, 0.8], **fields)
    agree(ours, theirs, 1e-5 if kind in RESOLVED else 1e-6)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_one_adapter_alone_is_taken_as_it_is(make_llama, ids, kind):
    ours, theirs = both(make_llama, A)
    twice(ours, theirs, ["default"], [1.0], **options(kind))
    same_config(ours, theirs)
    agree(ours, theirs)
    out = logits(ours, ids)
    ours.set_adapter("new")
    assert close(logits(ours, ids), out, 1e-5)


def test_one_adapter_alone_in_a_smaller_rank(make_llama):
    """Asked for a rank, PEFT gives the old one; here it is the best approximation of that rank."""
    ours, _ = both(make_llama, A)
    ours.add_weighted_adapter(["default"], [1.0], "new", "svd", svd_rank=2)
    assert ours.peft_config["new"].r == 2
    for path, update in products(ours).items():
        whole = products(ours, "default")[path]
        U, S, Vh = torch.linalg.svd(whole)
        assert close(update, U[:, :2] * S[:2] @ Vh[:2], 1e-5)


@pytest.mark.parametrize("targets", [(r".*\.(q|v)_proj", r".*\.up_proj"), (["q_proj"], r".*layers\.1\.mlp\.up_proj")])
def test_targets_as_expressions(make_llama, targets):
    configs = [{"target_modules": target, "r": 4} for target in targets]
    ours, theirs = both(make_llama, *configs)
    if all(isinstance(target, str) for target in targets):
        twice(ours, theirs, ["default", "b"], [0.5, 0.8], combination_type="cat")
        same_config(ours, theirs)
        agree(ours, theirs)
    else:  # PEFT refuses to join a list and an expression
        ours.add_weighted_adapter(["default", "b"], [0.5, 0.8], "new", "cat")
    assert adapters_named(ours.get_base_model(), "new").keys() == products(ours.get_base_model()).keys()


def test_no_layer_of_any_source_is_lost(make_llama, ids):
    """PEFT copies the first source's narrowing, and what the others adapt beyond it is gone without a word."""
    narrow = {"target_modules": ["q_proj"], "layers_to_transform": [0], "r": 4}
    wide = {"target_modules": ["v_proj", "q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"], "r": 4}
    ours, _ = both(make_llama, narrow, wide)
    ours.add_weighted_adapter(["default", "b"], [1.0, 1.0], "new", "cat")
    layers = [
        f"model.layers.{i}.self_attn.{p}" for i, p in ((0, "q_proj"), (0, "v_proj"), (1, "q_proj"), (1, "v_proj"))
    ]
    assert sorted(adapters_named(ours.get_base_model(), "new")) == sorted(layers)
    ours.set_adapter(["default", "b"])
    out = logits(ours, ids)
    ours.set_adapter("new")
    assert close(logits(ours, ids), out, 1e-5)


# --- other layers and dtypes --------------------------------------------------------------------------------------


def build_gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_layers_with_a_transposed_weight(kind):
    """GPT-2's Conv1D; c_proj of its attention is square, where a wrong orientation has the right shape."""
    fields = {"target_modules": ["c_attn", "c_proj"], "r": 3, "fan_in_fan_out": True}
    ours, theirs = both(build_gpt2, fields, {**fields, "lora_alpha": 2})
    twice(ours, theirs, ["default", "b"], [0.5, -0.8], **options(kind))
    agree(ours, theirs, 1e-5 if kind in RESOLVED else 1e-6)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_embeddings(make_llama, kind):
    fields = {"target_modules": ["embed_tokens", "q_proj"], "r": 3}
    ours, theirs = both(make_llama, fields, {**fields, "lora_alpha": 2})
    twice(ours, theirs, ["default", "b"], [0.5, -0.8], **options(kind))
    agree(ours, theirs, 1e-5 if kind in RESOLVED else 1e-6)


class Convolutions(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3, groups=groups)
        self.two = nn.Conv2d(4, 8, 3, groups=groups)
        self.point = nn.Conv2d(4, 8, 1, groups=groups)

    def forward(self, x):
        return self.one(x[..., 0]), self.two(x), self.point(x)


def build_convolutions(groups=1):
    torch.manual_seed(0)
    return Convolutions(groups)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_convolutions(kind):
    """PEFT decomposes the updates of two-dimensional ones only; here the others follow the same rule."""
    known = ["two", "point"] if kind in RESOLVED else ["one", "two", "point"]
    for targets in (known, ["one", "two", "point"]):
        fields = {"target_modules": targets, "r": 4}
        ours, theirs = both(build_convolutions, fields, {**fields, "lora_alpha": 3})
        if targets == known:
            twice(ours, theirs, ["default", "b"], [0.5, -0.8], **options(kind))
            agree(ours, theirs, 1e-5 if kind in RESOLVED else 1e-6)
        else:
            ours.add_weighted_adapter(["default", "b"], [0.5, -0.8], "new", **options(kind))
            assert len(products(ours)) == 3
        ours.set_adapter("new")
        x = torch.randn(2, 4, 6, 6)
        apart = ours(x)
        assert all(close(a, b, 1e-5) for a, b in zip(ours.merge_and_unload()(x), apart, strict=True))


def test_convolutions_with_groups_are_stacked_group_by_group():
    """PEFT concatenates all rows of A, and each group of B then reads rows that are another's."""
    ours, _ = both(lambda: build_convolutions(2), *({"target_modules": ["one", "two"], "r": r} for r in (2, 4)))
    x = torch.randn(2, 4, 6, 6)
    ours.set_adapter(["default", "b"])
    out = ours(x)
    ours.add_weighted_adapter(["default", "b"], [1.0, 1.0], "new", "cat")
    ours.set_adapter("new")
    assert all(close(a, b, 1e-5) for a, b in zip(ours(x), out, strict=True))
    with pytest.raises(AdapterError, match="'one' is a convolution with groups"):
        ours.add_weighted_adapter(["default", "b"], [1.0, 1.0], "newer", "svd")


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("cast", [True, False])
def test_half_precision(make_llama, ids, kind, cast):
    """float32 masters stay float32 (PEFT's cat rounds them); adapters kept in bfloat16 stay bfloat16."""
    model = deltaw.get_peft_model(make_llama(torch.bfloat16), LoraConfig(**A), autocast_adapter_dtype=cast)
    model.add_adapter("b", LoraConfig(**C), autocast_adapter_dtype=cast)
    stir(stir(model), adapter="b")
    model.add_weighted_adapter(["default", "b"], [0.5, 0.8], "new", **options(kind))
    new = [p for n, p in model.named_parameters() if ".new." in n]
    assert {p.dtype for p in new} == {torch.float32 if cast else torch.bfloat16}
    model.set_adapter("new")
    assert not close(logits(model, ids), logits(make_llama(torch.bfloat16), ids), 0.02)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    weights=st.lists(st.floats(-2, 2, allow_nan=False), min_size=3, max_size=3),
    kind=st.sampled_from(["cat", "svd"]),
)
def test_any_shape_and_rank(sizes, ranks, weights, kind):
    """Also ranks larger than the layer, where there are fewer singular vectors than the rank."""
    torch.manual_seed(0)
    model = deltaw.get_peft_model(
        nn.Sequential(nn.Linear(*sizes)), LoraConfig(target_modules=["0"], r=ranks[0], init_lora_weights=False)
    )
    names = ["default", "b", "c"][: len(ranks)]
    for name, r in list(zip(names, ranks, strict=True))[1:]:
        model.add_adapter(name, LoraConfig(target_modules=["0"], r=r, init_lora_weights=False))
    rank = sum(ranks) if kind == "svd" else None
    model.add_weighted_adapter(names, weights[: len(names)], "new", kind, svd_rank=rank)
    host = model.get_base_model()[0]
    total = sum(w * host.adapters[n].delta_weight().detach() for n, w in zip(names, weights, strict=False))
    assert torch.allclose(host.adapters["new"].delta_weight(), total, atol=1e-5 * (1 + float(total.abs().max())))


# --- what trains whole --------------------------------------------------------------------------------------------


def test_whole_modules_and_rows_come_from_the_one_that_has_them(make_llama, ids):
    """PEFT starts them again from the base, or loses them, without a word."""
    ours, _ = both(
        make_llama, A, {**A, "modules_to_save": ["lm_head"]}, {**A, "trainable_token_indices": [3, int(ids[0, 0])]}
    )
    ours.add_weighted_adapter(["default", "b", "c"], [1.0, 0.5, 0.5], "new", "cat")
    base = ours.get_base_model()
    assert torch.equal(base.lm_head.modules_to_save["new"].weight, base.lm_head.modules_to_save["b"].weight)
    rows = base.model.embed_tokens.trainable_tokens_delta
    assert torch.equal(rows["new"], rows["c"])
    assert rows["new"] is not rows["c"]
    assert ours.peft_config["new"].modules_to_save == ["lm_head"]
    ours.set_adapter(["default", "b", "c"])
    ours.set_adapter("new")


def test_two_that_train_the_same_thing_whole_are_refused(make_llama):
    ours, theirs = both(make_llama, {**A, "modules_to_save": ["lm_head"]}, {**A, "modules_to_save": ["lm_head"]}, A)
    with pytest.raises(ValueError, match="modules_to_save"):
        theirs.add_weighted_adapter(["default", "b"], [1.0, 1.0], "new", "cat")
    with pytest.raises(AdapterError, match=r"\['default', 'b'\] each train 'lm_head' \(modules_to_save\)"):
        ours.add_weighted_adapter(["default", "b"], [1.0, 1.0], "new", "cat")
    ours.add_adapter("d", LoraConfig(**A, trainable_token_indices=[1]))
    ours.add_adapter("e", LoraConfig(**A, trainable_token_indices=[2]))
    with pytest.raises(AdapterError, match=r"each train 'model.embed_tokens' \(trainable_token_indices\)"):
        ours.add_weighted_adapter(["d", "e"], [1.0, 1.0], "new", "cat")


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_updates_that_started_in_the_base_s_weight(make_llama, ids, kind):
    """PiSSA's factors are near W; its update is what training added. PEFT takes the new one's start off the base."""
    fields = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": "pissa"}
    model = stir(deltaw.get_peft_model(make_llama(), LoraConfig(**fields)))
    model.add_adapter("b", LoraConfig(**{**fields, "init_lora_weights": "olora"}))
    stir(model, adapter="b")
    base = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.add_weighted_adapter(["default", "b"], [0.5, 0.8], "new", kind, svd_rank=8 if kind == "svd" else None)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in base.items())
    assert model.peft_config["new"].init_lora_weights is True
    if kind != "linear":
        for _, host in host_layers(model):
            total = sum(w * host.adapters[n].delta_weight() for n, w in (("default", 0.5), ("b", 0.8)))
            assert close(host.adapters["new"].delta_weight(), total, 1e-5)


def test_rank_stabilised_sources(make_llama, ids):
    """PEFT keeps use_rslora for the new adapter, whose update is then sqrt(r) times too large."""
    ours, _ = both(make_llama, {**A, "use_rslora": True}, {**C, "use_rslora": True})
    ours.set_adapter(["default", "b"])
    out = logits(ours, ids)
    ours.add_weighted_adapter(["default", "b"], [1.0, 1.0], "new", "cat")
    ours.set_adapter("new")
    assert close(logits(ours, ids), out, 1e-5)
    assert not ours.peft_config["new"].use_rslora


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_layers_that_share_the_embedding_s_factors_go_on_sharing(make_llama, ids, kind):
    fields = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model = stir(deltaw.get_peft_model(make_llama(tied=True), LoraConfig(**fields, r=2)))
    model.add_adapter("b", LoraConfig(**fields, r=3))
    stir(model, adapter="b")
    model.set_adapter(["default", "b"])
    out = logits(model, ids)
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "new", kind, svd_rank=5 if kind == "svd" else None)
    assert model.peft_config["new"].target_modules == {"embed_tokens", "q_proj"}
    assert "lm_head" in adapters_named(model.get_base_model(), "new")
    model.set_adapter("new")
    assert close(logits(model, ids), out, 1e-5)
    merged = model.merge_and_unload()
    assert close(logits(merged, ids), out, 1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    model = deltaw.get_peft_model(make_llama(tied=True), LoraConfig(**fields))
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="ensure_weight_tying is set for some of the adapters only"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "new", kind)


# --- what cannot be -----------------------------------------------------------------------------------------------


@pytest.fixture
def several(make_llama):
    model = deltaw.get_peft_model(make_llama(bias=True), LoraConfig(**A))
    for name, fields in {
        "b": {**B, "r": 2},
        "biased": {**A, "bias": "all"},
        "own_bias": {**A, "lora_bias": True},
        "dora": {**A, "use_dora": True},
    }.items():
        model.add_adapter(name, LoraConfig(**fields))
    return stir(model)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (["defaul", "b"], [1.0], "new", "cat"),
            ["no adapter 'defaul'.*did you mean 'default'", "2 adapters, but 1 w"],
        ),
        ((["default", "b"], [1.0, 1.0], "new", "tie"), [r"combination_type='tie'.*did you mean 'ties'"]),
        ((["default", "b"], [1.0, 1.0], "b", "cat"), ["'b' exists already"]),
        ((["default", "b"], [1.0, 1.0], "../x", "cat"), ["adapter name '../x'"]),
        (([], [], "new", "cat"), ["no adapters are named"]),
        ((["default", "default"], [1.0, 1.0], "new", "cat"), ["'default' is named twice"]),
        ((["default", "b"], [1.0, float("nan")], "new", "cat"), ["weight nan"]),
        ((["default", "b"], [1.0, True], "new", "cat"), ["weight True"]),
        ((["default", "b"], [1.0, 1.0], "new", "ties_svd"), ["density=None: ties_svd needs"]),
        ((["default", "b"], [1.0, 1.0], "new", "dare_ties", None, None, True, None, 1.5), ["density=1.5"]),
        (
            (["default", "b"], [1.0, 1.0], "new", "svd", 0, 2.0, True, "gesv"),
            ["svd_rank=0", "svd_clamp", "svd_driver='gesv'"],
        ),
        (
            (["default", "b"], [1.0, 1.0], "new", "ties", None, None, True, None, 0.5, "totl"),
            ["majority_sign_method='totl'.*did you mean 'total'"],
        ),
        ((["default", "b"], [1.0, 1.0], "new", "linear"), [r"equal ranks.*v_proj' are \{'default': 4, 'b': 2\}"]),
        (
            (["biased", "own_bias", "dora"], [1.0, 1.0, 1.0], "new", "cat"),
            ["'biased' trains the base's own biases", "'own_bias' has biases of its own", "'dora' is DORA"],
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_faults_are_told_together_and_change_nothing(several, arguments, words):
    before, modules = state(several), list(several.named_modules())
    flags = [p.requires_grad for p in several.parameters()]
    with pytest.raises(AdapterError, match="add_weighted_adapter cannot combine") as error:
        several.add_weighted_adapter(*arguments)
    for word in words:
        with pytest.raises(AdapterError, match=word):
            raise error.value
    assert same_state(several, before)
    assert list(several.named_modules()) == modules
    assert [p.requires_grad for p in several.parameters()] == flags
    assert list(several.peft_config) == ["default", "b", "biased", "own_bias", "dora"]


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_a_combination_that_is_not_finite_is_taken_back(make_llama, kind):
    ours, _ = both(make_llama, A, C)
    with torch.no_grad():
        host = ours.get_base_model().model.layers[1].self_attn.v_proj
        host.lora_A["b"].weight.fill_(float("inf") if kind not in RESOLVED else float("nan"))
    before, modules = state(ours), list(ours.named_modules())
    with pytest.raises((AdapterError, RuntimeError), match=r"not finite|non-finite|converge"):
        ours.add_weighted_adapter(["default", "b"], [1.0, 1.0], "new", **options(kind))
    assert list(ours.state_dict()) == list(before)
    assert list(ours.named_modules()) == modules
    assert list(ours.peft_config) == ["default", "b"]
