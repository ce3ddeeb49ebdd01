"""Every method on every kind of layer, in float32 and bfloat16, one adapter and several, alone and against PEFT."""

from __future__ import annotations

import hypothesis.strategies as st
import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from matrix import CASES, LAYERS, Case, Holder, adapted, base, refusal, stirred
from peer import close
from torch import Tensor, nn

import deltaw
from deltaw.adapters import HostLayer
from deltaw.errors import ConfigError, DeltawError, MergeError
from deltaw.methods import METHODS
from deltaw.weights import wide

PAIRS = [(case, layer) for case in CASES for layer in LAYERS if not refusal(case, layer)]
#: LoRA's update of a grouped convolution has no place in the base's weight
MERGING = [(case, layer) for case, layer in PAIRS if layer != "grouped" or CASES[case].method in ("loha", "lokr")]
WITH_PEFT = [pair for pair in PAIRS if not refusal(*pair, library=peft)]
#: their factors come from the base weight: a second one sees what the first has left, in PEFT
DECOMPOSED = {"pissa", "olora"}
#: these start at zero but for rounding: what they add is taken off again, or is B A of orthogonal factors
MOVED = {*DECOMPOSED, "lora orthogonal"}
#: (case, part of a name) -> PEFT 0.21.2's gradient is not that of its own forward (checked by differences)
PEFT_ERRS = {("loha effective", "hada_w1_a"), ("loha effective", "hada_w2_a")}
ONE, SEVERAL = ("default",), ("default", "other")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest output


def over(found: list[tuple[str, str]]):
    return pytest.mark.parametrize(("case", "layer"), found, ids=[" on ".join(pair) for pair in found])


pairs, merging, with_peft = over(PAIRS), over(MERGING), over(WITH_PEFT)
with_several_of_peft_s = pytest.mark.parametrize(
    ("case", "layer", "names"),
    [(*pair, names) for pair in WITH_PEFT for names in (ONE, SEVERAL) if names == ONE or pair[0] not in DECOMPOSED],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
counts = pytest.mark.parametrize("names", [ONE, SEVERAL], ids=["one", "several"])


def host_of(model) -> HostLayer:
    return model.get_base_model().layer


def run(model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def formula(host: HostLayer, x: Tensor) -> Tensor:
    """The layer's output by its plain weight: base and updates added up first."""
    weight, bias = wide(host.store.dequantize().detach()), host.bias
    for adapter in host.adapters.values():
        weight, bias = adapter.merged_weight(weight), adapter.merged_bias(bias)
    if host.kind == "linear":
        return F.linear(x, weight, bias)  # whichever way the weight is stored
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return torch.func.functional_call(host.base_layer, tensors, (x,))


def gradients(out: Tensor, parameters: list[Tensor]) -> list[Tensor | None]:
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * probe).sum(), parameters, allow_unused=True))


# --- who supports what --------------------------------------------------------------------------------------


def test_the_registry_s_promises_hold_for_real_layers():
    """Every method adapts linear layers of both kinds, and something is adapted of each kind of layer."""
    for name in METHODS:
        assert not refusal(name, "Linear"), name
        assert not refusal(name, "Conv1D"), name
    assert {layer for _, layer in PAIRS} == set(LAYERS)


@over([(case, layer) for case in CASES for layer in LAYERS if refusal(case, layer)])
def test_what_is_refused_is_refused_by_name_and_by_peft_too(case, layer):
    told = refusal(case, layer)
    assert "layer" in told
    assert len(told) < 400
    with pytest.raises(DeltawError):
        adapted(case, layer)
    assert refusal(case, layer, library=peft), "PEFT can do this"


# --- ours alone ---------------------------------------------------------------------------------------------


@pairs
@dtypes
@counts
def test_it_starts_as_the_base(case, layer, dtype, names):
    x = LAYERS[layer].inputs(dtype)
    before, after = run(base(layer, dtype), x), run(adapted(case, layer, dtype, names), x)
    assert after.dtype == before.dtype
    if case in MOVED:
        assert close(after, before, TOLERANCE[dtype])
    else:
        assert torch.equal(after, before)


@merging
@counts
def test_forward_and_gradients_are_those_of_the_plain_formula(case, layer, names):
    """float64, so that no two orders of a sum differ."""
    model, x = stirred(adapted(case, layer, torch.float64, names)), LAYERS[layer].inputs(torch.float64)
    host = host_of(model)
    held = [p for name in names for p in host.adapters[name].parameters() if p.requires_grad]
    assert held
    leaf = x.clone().requires_grad_() if x.is_floating_point() else x
    leaves = [*held, leaf] if x.is_floating_point() else held
    ours, plain = model(leaf), formula(host, leaf)
    assert not close(ours, run(base(layer, torch.float64), x), 1e-2)
    assert close(ours, plain, 1e-9)
    for mine, expected in zip(gradients(ours, leaves), gradients(plain, leaves), strict=True):
        assert mine is not None
        assert expected is not None
        assert bool(expected.any())
        assert close(mine, expected, 1e-9)


@merging
@dtypes
@counts
def test_merging_is_the_forward_and_unmerging_is_bitwise(case, layer, dtype, names):
    model, x = stirred(adapted(case, layer, dtype, names)), LAYERS[layer].inputs(dtype)
    host = host_of(model)
    apart = run(model, x)
    kept = {name: tensor.clone() for name, tensor in host.base_layer.state_dict().items()}
    model.merge_adapter()
    assert close(run(model, x), apart, TOLERANCE[dtype])
    assert not torch.equal(host.base_layer.state_dict()["weight"], kept["weight"])
    model.unmerge_adapter()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in host.base_layer.state_dict().items())
    assert torch.equal(run(model, x), apart)
    plain = model.merge_and_unload()
    assert type(plain.layer) is type(base(layer).layer)
    assert close(run(plain, x), apart, TOLERANCE[dtype])


@pairs
@dtypes
@counts
def test_what_is_saved_is_loaded_bitwise(case, layer, dtype, names, tmp_path):
    model, x = stirred(adapted(case, layer, dtype, names)), LAYERS[layer].inputs(dtype)
    model.save_pretrained(tmp_path)
    back = deltaw.PeftModel.from_pretrained(base(layer, dtype), tmp_path)
    for name in names[1:]:
        back.load_adapter(tmp_path / name, adapter_name=name)
    back.set_adapter(list(names))
    if case in MOVED - {"lora orthogonal"}:  # written as LoRA over the base as it was
        assert close(run(back, x), run(model, x), TOLERANCE[dtype])
    else:
        mine, read = dict(model.named_parameters()), dict(back.named_parameters())
        assert mine.keys() == read.keys()
        assert all(torch.equal(mine[name], read[name]) for name in mine)
        assert torch.equal(run(back, x), run(model, x))
    again = tmp_path / "again"
    back.save_pretrained(again)
    for file in tmp_path.glob("**/adapter_model.safetensors"):
        if again not in file.parents and case not in MOVED:
            assert (again / file.relative_to(tmp_path)).read_bytes() == file.read_bytes()


@pairs
@counts
def test_taking_it_away_leaves_the_base(case, layer, names):
    x = LAYERS[layer].inputs()
    model = stirred(adapted(case, layer, names=names))
    with model.disable_adapter():
        assert close(run(model, x), run(base(layer), x), 1e-5 if case not in MOVED else 10)
    plain = model.unload()
    assert not any(isinstance(module, HostLayer) for module in plain.modules())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in base(layer).named_parameters()]


# --- beside PEFT --------------------------------------------------------------------------------------------


@with_several_of_peft_s
def test_one_seed_gives_peft_s_adapters_under_peft_s_names(case, layer, names):
    ours, theirs = (
        dict(adapted(case, layer, names=names, library=library).named_parameters()) for library in (deltaw, peft)
    )
    assert list(ours) == list(theirs)
    for name in ours:
        if case in DECOMPOSED and name.endswith("base_layer.weight"):
            continue  # PEFT changes the base, we take the start off the update
        assert torch.equal(ours[name], theirs[name]) or (case in MOVED and close(ours[name], theirs[name], 1e-5)), name


@with_several_of_peft_s
def test_forward_gradients_and_merged_weight_are_peft_s(case, layer, names):
    x = LAYERS[layer].inputs()
    ours, theirs = (stirred(adapted(case, layer, names=names, library=library)) for library in (deltaw, peft))
    tolerance = 1e-5 if case in MOVED else 1e-6
    assert close(run(ours, x), run(theirs, x), tolerance)
    held, peers = dict(ours.named_parameters()), dict(theirs.named_parameters())
    trained = [name for name, parameter in peers.items() if parameter.requires_grad]
    assert trained
    mine = gradients(ours(x), [held[name].requires_grad_() for name in trained])
    for name, a, b in zip(trained, mine, gradients(theirs(x), [peers[name] for name in trained]), strict=True):
        assert a is not None
        assert b is not None
        assert close(a, b, 5e-5) or any(case == one and part in name for one, part in PEFT_ERRS), name
    for model in (ours, theirs):
        model.merge_adapter()
    merged = [dict(model.get_base_model().layer.base_layer.named_parameters()) for model in (ours, theirs)]
    for name in merged[0]:
        assert close(merged[0][name], merged[1][name], tolerance), name


@pytest.mark.filterwarnings("ignore:.*tensor.s. have invalid shape")  # PEFT takes lora_B.bias for damaged
@with_peft
def test_files_are_exchanged_both_ways(case, layer, tmp_path):
    x = LAYERS[layer].inputs()
    ours = stirred(adapted(case, layer))
    ours.save_pretrained(tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(base(layer), tmp_path / "ours").eval()
    tolerance = 1e-5 if case in MOVED else 1e-6
    assert close(run(there, x), run(ours, x), tolerance)
    theirs = stirred(adapted(case, layer, library=peft))
    theirs.save_pretrained(tmp_path / "theirs")
    here = deltaw.PeftModel.from_pretrained(base(layer), tmp_path / "theirs").eval()
    assert close(run(here, x), run(theirs, x), tolerance)


@pytest.mark.parametrize("case", ["lora", "rslora", "lora gaussian", "lora with bias"])
def test_a_grouped_convolution_trains_and_refuses_to_merge(case):
    x = LAYERS["grouped"].inputs()
    model = stirred(adapted(case, "grouped"))
    apart = run(model, x)
    with pytest.raises(MergeError, match="groups"):
        model.merge_adapter()
    assert torch.equal(run(model, x), apart)
    with pytest.warns(UserWarning, match="groups > 1"):
        theirs = stirred(adapted(case, "grouped", library=peft))
    assert close(apart, run(theirs, x))


# --- over shapes, ranks, dropouts, patterns -----------------------------------------------------------------

METHOD = st.sampled_from(list(METHODS))
DROPOUTS = {"LoraConfig": ["lora_dropout"], "AdaLoraConfig": ["lora_dropout"]}
LYCORIS = ["rank_dropout", "module_dropout"]


def ranks(method: str, r: int) -> dict[str, int]:
    return {"init_r": r, "target_r": max(1, r // 2)} if method == "adalora" else {"r": r}


class Chain(nn.Module):
    """Layers that run one after the other; ``layer`` is the first."""

    def __init__(self, layer: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.layer, self.second = layer, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.layer(x))


@settings(max_examples=150)
@given(
    method=METHOD,
    width=st.integers(1, 14),
    out=st.integers(1, 14),
    r=st.integers(1, 9),
    kernel=st.sampled_from([None, None, 1, 2, 3]),
    rows=st.integers(0, 4),
)
def test_any_shape_and_rank_merges_to_its_forward(method, width, out, r, kernel, rows):
    """float64; what is refused is a rank that the start needs more of than the layer has, or the layer itself."""
    torch.manual_seed(width * 100 + out)
    made = nn.Linear(width, out) if kernel is None else nn.Conv1d(width, out, kernel)
    x = torch.randn(rows, 3, width) if kernel is None else torch.randn(rows, width, 4)
    before = run(made.double(), x.double())
    try:
        model = deltaw.get_peft_model(Holder(made), Case(method, ranks(method, r)).config())
    except ConfigError as error:
        told = str(error)
        assert "layer" in told
        assert kernel is not None or (r > min(width, out) and str(r) in told)
        return
    start = run(model, x.double())
    assert torch.allclose(start, before, atol=1e-9) if method in MOVED else torch.equal(start, before)
    apart = run(stirred(model), x.double())
    assert apart.shape == before.shape
    kept = model.base_model.model.layer.weight.detach().clone()
    model.merge_adapter()
    assert torch.allclose(run(model, x.double()), apart, atol=1e-9)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.layer.weight, kept)


@settings(max_examples=40)
@given(method=METHOD, p=st.sampled_from([0.0, 0.1, 0.5, 0.9]), which=st.integers(0, 1), seed=st.integers(0, 99))
def test_dropout_acts_in_training_alone_and_is_its_seed_s(method, p, which, seed):
    field = DROPOUTS.get(METHODS[method].config, LYCORIS)[which % len(DROPOUTS.get(METHODS[method].config, LYCORIS))]
    model = stirred(adapted(Case(method, {field: p}), "Linear"))
    plain = stirred(adapted(method, "Linear"))
    x = LAYERS["Linear"].inputs()
    assert torch.equal(run(model, x), run(plain, x))
    outs = []
    for _ in range(2):
        torch.manual_seed(seed)
        outs.append(run(model.train(), x))
    assert torch.equal(*outs)
    if p == 0:
        assert torch.equal(outs[0], run(plain.train(), x))
    elif field != "module_dropout":
        assert p < 0.5 or not torch.equal(outs[0], run(model.eval(), x))


@settings(max_examples=40)
@given(
    method=st.sampled_from([name for name in METHODS if name != "adalora"]),
    rank=st.integers(1, 6),
    alpha=st.integers(1, 20),
    key=st.sampled_from(["second", "layer", r"(layer|second)", "^second$"]),
)
def test_patterns_mean_what_they_mean_to_peft(method, rank, alpha, key):
    """float32; ranks, scales and outputs are PEFT's."""
    models = []
    for library in (deltaw, peft):
        torch.manual_seed(1)
        chain = Chain(nn.Linear(8, 10), nn.Linear(10, 8))
        config = Case(method, {"rank_pattern": {key: rank}, "alpha_pattern": {key: alpha}}).config(library)
        config.target_modules = {"layer", "second"}
        torch.manual_seed(2)
        models.append(stirred(library.get_peft_model(chain, config).eval()))
    for name in ("layer", "second"):
        ours, theirs = (getattr(model.get_base_model(), name) for model in models)
        assert ours.r == theirs.r
        assert ours.scaling == pytest.approx(theirs.scaling)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))
    assert close(run(models[0], x), run(models[1], x), 1e-5 if method in MOVED else 2e-6)
