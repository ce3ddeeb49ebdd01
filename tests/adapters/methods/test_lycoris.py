"""LoHa and LoKr beside PEFT: the start, the numbers, merging, files, convolutions, dropout, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
from peer import ATTENTION, close, gradients, logits, same_state, state, stir
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import deltaw
from deltaw.adapters import Linear, host_layers
from deltaw.adapters.hosts.conv import Conv
from deltaw.adapters.methods.loha import LoHa, LoHaConfig, LoHaConv
from deltaw.adapters.methods.lokr import LoKr, LoKrConfig, LoKrConv
from deltaw.errors import ConfigError, DeltawError, TargetError

#: name -> (config class, fields)
VARIANTS = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "loha_large": ("LoHaConfig", {"r": 40, "alpha": 3}),  # r^2 beyond every side: ΔW is built
    "loha_effective": ("LoHaConfig", {"r": 2, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr_whole": ("LoKrConfig", {"r": 64, "alpha": 32}),
    "lokr_both": ("LoKrConfig", {"r": 1, "decompose_both": True}),
    "lokr_factor": ("LoKrConfig", {"r": 2, "decompose_factor": 2, "decompose_both": True}),
    "lokr_lycoris": ("LoKrConfig", {"r": 2, "init_weights": "lycoris"}),
    "lokr_effective": ("LoKrConfig", {"r": 2, "alpha": 2, "use_effective_conv2d": True, "decompose_factor": 2}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
METHODS = {"LoHaConfig": (LoHa, LoHaConv), "LoKrConfig": (LoKr, LoKrConv)}
both = pytest.mark.parametrize("kind", METHODS)


def config_of(variant, library=deltaw, **fields):
    kind, own = VARIANTS[variant]
    return getattr(library, kind)(**{**own, **copy.deepcopy(fields)})


def pair(variant, build, seed=7, **fields):
    """(ours, PEFT's) on two equal bases, initialised from the same seed."""
    made = []
    for library in (deltaw, peft):
        torch.manual_seed(seed)
        made.append(library.get_peft_model(build(), config_of(variant, library, **fields)))
    return made


class Convs(nn.Module):
    """A network of all the convolutions that PEFT's LyCORIS layers know, with groups and dilation, and a linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.point = nn.Conv2d(12, 12, 1, bias=False)
        self.grouped = nn.Conv2d(12, 12, (3, 1), groups=3, padding="same", dilation=2)
        self.line = nn.Conv1d(12, 16, 3, padding=2, dilation=2)
        self.spot = nn.Conv1d(16, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.grouped(torch.tanh(self.point(torch.tanh(self.wide(x)))))
        return self.head(self.spot(torch.tanh(self.line(x.flatten(2)))).mean(-1))


TARGETS = ["wide", "point", "grouped", "line", "spot", "head"]
IMAGES = torch.randn(3, 8, 9, 9, generator=torch.Generator().manual_seed(0))


def host_of(kind, layer=None, training=False, dtype=torch.float32, **fields):
    """One active adapter "a" on ``layer``, none of its parameters at zero."""
    layer = layer or nn.Linear(12, 10, dtype=dtype)
    host = Linear(layer) if isinstance(layer, nn.Linear) else Conv(layer)
    method = METHODS[kind][0 if isinstance(layer, nn.Linear) else 1]
    torch.manual_seed(3)
    host.add(method, "a", getattr(deltaw, kind)(**{"r": 2, "init_weights": False, **fields}), "layer")
    host.requires_grad_(False).set_active(["a"])
    return host.train(training)


# --- the start ----------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bitwise(make_llama, ids, variant, dtype):
    base = logits(make_llama(dtype, bias=True), ids)
    fields = {"target_modules": "all-linear", "rank_dropout": 0.2, "module_dropout": 0.2}
    model = deltaw.get_peft_model(make_llama(dtype, bias=True), config_of(variant, **fields))
    assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model.train(), ids), base)


@variants
def test_the_start_is_the_base_bitwise_on_convolutions(variant):
    model = deltaw.get_peft_model(Convs(), config_of(variant, target_modules=TARGETS))
    assert torch.equal(model(IMAGES), Convs()(IMAGES))


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [None, False])
@pytest.mark.parametrize("cast", [True, False])
def test_one_seed_gives_peft_s_adapter(make_llama, variant, dtype, init, cast):
    fields = {"target_modules": "all-linear", **({} if init is None else {"init_weights": init})}
    models = []
    for library in (deltaw, peft):
        torch.manual_seed(3)
        config = config_of(variant, library, **fields)
        models.append(library.get_peft_model(make_llama(dtype), config, autocast_adapter_dtype=cast))
    for (name, a), (other, b) in zip(*(model.named_parameters() for model in models), strict=True):
        assert name == other
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name


@variants
def test_one_seed_gives_peft_s_adapter_on_convolutions(variant):
    ours, theirs = pair(variant, Convs, target_modules=TARGETS)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


# --- the numbers --------------------------------------------------------------------------------------------------

FIELDS = [
    {"target_modules": "all-linear"},
    {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 4, r"layers\.1\..*": 1}, "alpha_pattern": {"k_proj": 7}},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"], "layers_to_transform": [1]},
]


@variants
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_forward_and_gradients_are_peft_s(make_llama, ids, variant, fields):
    """float32: logits to 1e-6 of the largest (4e-6 where r^2 = 1600 terms are added up), gradients to 5e-5."""
    ours, theirs = pair(variant, lambda: make_llama(bias=True), **fields)
    stir(ours), stir(theirs)
    assert not close(logits(ours, ids), logits(make_llama(bias=True), ids), 1e-3)
    assert close(logits(ours, ids), logits(theirs, ids), 4e-6 if variant == "loha_large" else 1e-6)
    mine, peers = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == peers.keys()
    for name in mine:
        assert mine[name].any()
        assert close(mine[name], peers[name], 5e-5), name


@variants
def test_forward_and_gradients_are_peft_s_on_convolutions(variant):
    ours, theirs = pair(variant, Convs, target_modules=TARGETS)
    stir(ours, 0.3), stir(theirs, 0.3)
    assert not close(ours(IMAGES), Convs()(IMAGES), 1e-2)
    assert close(ours(IMAGES), theirs(IMAGES))
    found = []
    for model in (ours, theirs):
        model(IMAGES).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        # PEFT 0.21.2 takes these two through the other product's core; test_loha has them against autograd
        wrong = (
            variant == "loha_effective" and "_a." in name and any(f".{n}." in name for n in ("wide", "grouped", "line"))
        )
        assert close(found[0][name], found[1][name], 5e-5) != wrong, name


@variants
def test_bf16_is_as_near_to_float32_as_peft_is(make_llama, ids, variant):
    """PEFT computes the update in float32 and adds it to a rounded output; within 2% of each other, and no farther from
    float32 than PEFT (x 1.25)."""
    ours, theirs = pair(variant, lambda: make_llama(torch.bfloat16), target_modules="all-linear")
    stir(ours), stir(theirs)
    exact, _ = pair(variant, lambda: make_llama(torch.bfloat16).float(), target_modules="all-linear")
    exact.load_state_dict(ours.state_dict())
    right = logits(exact, ids)
    mine, peers = logits(ours, ids), logits(theirs, ids)
    assert (mine - right).abs().mean() <= 1.25 * (peers - right).abs().mean()
    assert close(mine, peers, 0.02)
    grads, others = gradients(ours, ids), gradients(theirs, ids)
    for name in grads:
        assert grads[name].dtype == others[name].dtype == torch.float32
        assert (grads[name] - others[name]).norm() <= 0.05 * others[name].norm(), name


@pytest.mark.parametrize("variant", ["loha", "loha_large", "lokr", "lokr_whole", "lokr_both"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect"])
def test_a_convolution_s_update_is_that_of_its_weight(variant, padding_mode):
    """The output is that of the merged convolution, padding mode and dilation included (PEFT ignores the former)."""
    kind, fields = VARIANTS[variant]
    for layer, x in (
        (nn.Conv1d(6, 8, 3, padding=2, dilation=2, padding_mode=padding_mode), torch.randn(2, 6, 11)),
        (nn.Conv2d(6, 8, (3, 2), padding=2, stride=(1, 2), padding_mode=padding_mode), torch.randn(2, 6, 7, 8)),
    ):
        host = host_of(kind, layer, **fields)
        out, before = host(x).detach(), layer.weight.clone()
        assert not torch.allclose(out, layer(x), rtol=1e-3)
        host.merge(["a"])
        torch.testing.assert_close(host(x), out, rtol=1e-4, atol=1e-5 * float(out.abs().max()))
        host.unmerge()
        assert torch.equal(layer.weight, before)


# --- merging ------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_weight_is_peft_s_bitwise_and_unmerging_brings_the_base_back(make_llama, ids, variant, dtype):
    ours, theirs = pair(variant, lambda: make_llama(dtype, bias=True), target_modules="all-linear")
    stir(ours), stir(theirs)
    before, out = state(ours), logits(ours, ids)
    ours.merge_adapter(), theirs.merge_adapter()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert close(logits(ours, ids), out, 1e-5 if dtype == torch.float32 else 0.03)
    ours.unmerge_adapter()
    assert same_state(ours, before)
    assert torch.equal(logits(ours, ids), out)
    whole = ours.merge_and_unload()
    assert not list(host_layers(whole))
    assert close(logits(whole, ids), out, 1e-5 if dtype == torch.float32 else 0.03)


@variants
def test_merging_convolutions(variant):
    ours, theirs = pair(variant, Convs, target_modules=TARGETS)
    stir(ours, 0.3), stir(theirs, 0.3)
    before, out = state(ours), ours(IMAGES)
    ours.merge_adapter(), theirs.merge_adapter()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert close(a, b) or not b.any(), name
    assert close(ours(IMAGES), out, 1e-5)
    ours.unmerge_adapter()
    assert same_state(ours, before)


# --- files --------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("base", ["llama", "convs"])
def test_files_are_exchanged_with_peft(make_llama, ids, variant, base, tmp_path):
    if base == "llama":
        build, run = lambda: make_llama(bias=True), lambda model: logits(model, ids)
        fields = {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "task_type": "CAUSAL_LM"}
    else:
        build, run, fields = Convs, lambda model: model(IMAGES).detach(), {"target_modules": TARGETS}
    ours, theirs = pair(variant, build, **fields)
    stir(ours), stir(theirs, 0.1)
    ours.save_pretrained(tmp_path / "ours"), theirs.save_pretrained(tmp_path / "theirs")
    mine, peers = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in peers.items()}
    written, read = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "theirs"))
    assert written.keys() == read.keys()
    for key in written.keys() - {"peft_version", "auto_mapping", "target_modules"}:
        assert written[key] == read[key], key
    assert set(written["target_modules"]) == set(read["target_modules"])

    assert torch.equal(run(deltaw.PeftModel.from_pretrained(build(), tmp_path / "ours")), run(ours))
    assert close(run(deltaw.PeftModel.from_pretrained(build(), tmp_path / "theirs")), run(theirs), 4e-6)
    assert close(run(peft.PeftModel.from_pretrained(build(), tmp_path / "ours")), run(ours), 4e-6)
    light = deltaw.PeftModel.from_pretrained(build(), tmp_path / "ours", low_cpu_mem_usage=True)
    assert torch.equal(run(light), run(ours))


@both
def test_a_file_that_does_not_fit_is_refused(make_llama, kind, tmp_path):
    model = deltaw.get_peft_model(make_llama(), getattr(deltaw, kind)(target_modules=ATTENTION, r=1))
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 1', '"r": 3'))
    with pytest.raises(DeltawError, match="does not fit"):
        deltaw.PeftModel.from_pretrained(make_llama(), tmp_path)
    other = {"LoHaConfig": "LOKR", "LoKrConfig": "LOHA"}[kind]
    config.write_text(config.read_text().replace(getattr(deltaw, kind)().peft_type, other))
    with pytest.raises(DeltawError):
        deltaw.PeftModel.from_pretrained(make_llama(), tmp_path)


# --- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["loha", "loha_large", "lokr", "lokr_whole"])
@pytest.mark.parametrize("layer", [nn.Linear(12, 10), nn.Conv2d(4, 10, 3)], ids=["linear", "conv"])
def test_rank_dropout_drops_outputs_of_the_update(variant, layer):
    kind, fields = VARIANTS[variant]
    if kind == "LoKrConfig":
        fields = {**fields, "rank_dropout_scale": True}
    host = host_of(kind, copy.deepcopy(layer).requires_grad_(False), True, rank_dropout=0.4, **fields)
    x = torch.randn(40, 12) if isinstance(layer, nn.Linear) else torch.randn(8, 4, 5, 5)
    dims = [0] if isinstance(layer, nn.Linear) else [0, 2, 3]
    update = host.eval()(x) - host.base_layer(x)
    seen = []
    for _ in range(60):
        moved = host.train()(x) - host.base_layer(x)
        size = (moved * update).sum(dims) / update.square().sum(dims)  # (out,)
        torch.testing.assert_close(moved, update * size.view(-1, *[1] * (len(dims) - 1)), rtol=1e-3, atol=1e-4)
        kept = size > 1e-3
        if kept.any():  # as in PEFT, what is kept makes up for the rest
            torch.testing.assert_close(size[kept], (10 / kept.sum()).expand(int(kept.sum())), rtol=1e-3, atol=1e-4)
        seen.append(kept)
    assert abs(torch.stack(seen).float().mean() - 0.6) < 0.08
    assert torch.equal(host.adapters["a"].delta_weight(), host.eval().adapters["a"].delta_weight())


def test_rank_dropout_of_lokr_leaves_the_kept_rows_alone_unless_told_to_scale():
    host, x = host_of("LoKrConfig", training=True, rank_dropout=0.5), torch.randn(4, 12)
    update = host.eval()(x) - host.base_layer(x)
    moved = host.train()(x) - host.base_layer(x)
    kept = moved.abs().sum(0) > 1e-6
    assert 0 < kept.sum() < 10
    torch.testing.assert_close(moved[:, kept], update[:, kept])


@both
def test_with_every_row_dropped_the_update_is_zero_and_not_nan(kind):
    scale = {"rank_dropout_scale": True} if kind == "LoKrConfig" else {}
    host, x = host_of(kind, nn.Linear(3, 2), True, rank_dropout=0.9, **scale), torch.randn(4, 3)
    outs = [host(x) for _ in range(20)]
    assert all(torch.isfinite(out).all() for out in outs)
    assert any(torch.equal(out, host.base_layer(x)) for out in outs)


@both
@pytest.mark.parametrize("layer", [nn.Linear(12, 10), nn.Conv1d(12, 10, 3)], ids=["linear", "conv"])
def test_module_dropout_leaves_the_adapter_out(kind, layer):
    host = host_of(kind, copy.deepcopy(layer), True, module_dropout=0.3)
    x = torch.randn(4, 12) if isinstance(layer, nn.Linear) else torch.randn(4, 12, 7)
    base, whole = host.base_layer(x), host.eval()(x)
    outs = [host.train()(x) for _ in range(300)]
    assert all(torch.equal(out, base) or torch.equal(out, whole) for out in outs)
    left_out = sum(torch.equal(out, base) for out in outs) / len(outs)
    assert abs(left_out - 0.3) < 0.09
    assert all(torch.equal(host.eval()(x), whole) for _ in range(10))


@pytest.mark.parametrize("variant", ["loha", "loha_large", "lokr"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [{"rank_dropout": 0.5}, {"module_dropout": 0.5}])
def test_what_is_dropped_is_dropped_again_in_a_recomputed_forward(variant, reentrant, dropout):
    kind, fields = VARIANTS[variant]
    host = host_of(kind, None, True, torch.float64, **fields, **dropout)
    adapter, seen = host.adapters["a"], set()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    for seed in range(8):
        found = []
        for wrap in (False, True):
            torch.manual_seed(seed)
            for leaf in (x, *adapter.parameters()):
                leaf.grad = None
            out = checkpoint(host, x, use_reentrant=reentrant) if wrap else host(x)
            out.sum().backward()
            found.append([x.grad, *(p.grad for p in adapter.parameters())])
        torch.testing.assert_close(*found)
        seen.add(found[0][0].sum().item())
    assert len(seen) > 1


@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_dropout_under_a_compiler_without_a_break(variant):
    kind, fields = VARIANTS[variant]
    host, x = host_of(kind, None, True, rank_dropout=0.3, module_dropout=0.5, **fields), torch.randn(4, 12)
    compiled = torch.compile(lambda x: host(x), fullgraph=True, backend="aot_eager")
    outs = [compiled(x) for _ in range(40)]
    out_of_it = sum(torch.allclose(out, host.base_layer(x), atol=1e-6) for out in outs)
    assert 8 <= out_of_it <= 32
    torch.testing.assert_close(torch.compile(host.eval(), fullgraph=True, backend="aot_eager")(x), host(x))


# --- beside others ------------------------------------------------------------------------------------------------


def test_adapters_of_several_methods_add_up(llama, ids):
    model = stir(deltaw.get_peft_model(llama, config_of("loha", target_modules=["q_proj"])))
    model.add_adapter("kron", config_of("lokr", target_modules=["q_proj", "v_proj"]))
    model.add_adapter("low", deltaw.LoraConfig(target_modules=["q_proj"], r=2))
    for name in ("kron", "low"):
        model.set_adapter(name)
        stir(model, adapter=name)
    for names in (["default", "kron", "low"], ["low", "kron"], ["kron", "default"]):
        model.base_model.set_adapter(names)
        name, host = next(host_layers(model))
        x = torch.randn(2, 32)
        updates = sum(host.adapters[name].delta_weight() for name in names)
        assert torch.allclose(host(x), host.base_layer(x) + x @ updates.T, atol=1e-5), name
    model.delete_adapter("kron")
    assert "kron" not in "".join(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("variant", ["loha", "loha_large", "lokr"])
def test_a_mixed_batch_runs_each_row_through_its_own(llama, variant):
    model = stir(deltaw.get_peft_model(llama, config_of(variant, target_modules=ATTENTION)))
    model.add_adapter("other", config_of(variant, target_modules=ATTENTION))
    model.set_adapter("other")
    stir(model, 0.2, adapter="other")
    ids = torch.randint(3, 128, (3, 5), generator=torch.Generator().manual_seed(2))
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=ids[row : row + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=ids[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@both
def test_gpt_2_s_transposed_linear_layer(kind):
    """PEFT's LoHa and LoKr have no host for it."""
    layer = Conv1D(10, 12).requires_grad_(False)
    host = Linear(layer)
    host.add(METHODS[kind][0], "a", getattr(deltaw, kind)(r=2, init_weights=False), "layer")
    host.set_active(["a"])
    x, before = torch.randn(3, 12), layer.weight.clone()
    out = host(x).detach()
    torch.testing.assert_close(out, layer(x) + x @ host.adapters["a"].delta_weight().T)
    host.merge(["a"])
    torch.testing.assert_close(host(x), out)
    host.unmerge()
    assert torch.equal(layer.weight, before)


@variants
def test_autocast_runs_in_bf16(llama, ids, variant):
    model = stir(deltaw.get_peft_model(llama, config_of(variant, target_modules="all-linear")))
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert close(out.logits.float(), exact, 0.05)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in trained)


@both
def test_autocast_on_a_convolution(kind):
    host, x = host_of(kind, nn.Conv2d(4, 10, 3)), torch.randn(2, 4, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = host(x)
    assert out.dtype == torch.bfloat16
    assert close(out.float(), host(x), 0.03)


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_whole_model_changes_dtype(llama, ids, variant, dtype):
    model = stir(deltaw.get_peft_model(llama, config_of(variant, target_modules="all-linear")))
    exact = logits(model, ids)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert close(logits(model, ids), exact, 0.05 if dtype == torch.bfloat16 else 1e-5)


@variants
def test_copies_and_pickles(llama, ids, variant):
    config = config_of(variant, target_modules=["q_proj", "v_proj"])
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    model = stir(deltaw.get_peft_model(llama, config))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    with torch.no_grad():
        stir(twin)
    assert not torch.equal(logits(twin, ids), logits(model, ids))


# --- what is refused ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "the rank must be a positive integer"),
        ({"rank_dropout": 1.0}, r"rank_dropout=1.0: a probability in \[0, 1\)"),
        ({"module_dropout": -0.1}, "module_dropout=-0.1"),
        ({"alpha": float("nan")}, "alpha=nan: a finite number"),
        ({"init_weights": "lycris"}, "init_weights='lycris'"),
        ({"use_effective_conv2d": "yes"}, "use_effective_conv2d='yes'"),
    ],
)
def test_faults_of_a_config(kind, fields, words):
    with pytest.raises(ConfigError, match=words):
        getattr(deltaw, kind)(**fields)


def test_several_faults_are_one_error():
    with pytest.raises(ConfigError) as error:
        LoKrConfig(decompose_factor=0, init_weights="lycori", rank_dropout=2, r=-1)
    for words in ("decompose_factor=0", "did you mean 'lycoris'", "rank_dropout=2", "r=-1"):
        assert words in str(error.value)


@both
def test_a_setting_of_another_method_is_refused_in_a_file(kind):
    with pytest.raises(ConfigError, match="lora_alpha=16"):
        getattr(deltaw, kind).from_dict({"lora_alpha": 16})
    assert getattr(deltaw, kind).from_dict({"lora_alpha": None}).alpha == 8


@both
def test_layers_that_are_not_supported_are_named_and_the_model_is_left_as_it_was(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.volume = nn.Linear(3, 3), nn.Conv3d(3, 3, 2)
            self.words = nn.Embedding(5, 3)

    net = Net()
    before = {name: id(module) for name, module in net.named_modules()}
    for targets, words in ((["head", "volume"], "Conv3d"), (["head", "words"], "Embedding")):
        with pytest.raises((ConfigError, TargetError), match=words):
            deltaw.inject_adapter_in_model(getattr(deltaw, kind)(target_modules=targets), net)
        assert {name: id(module) for name, module in net.named_modules()} == before
        assert all(p.requires_grad for p in net.parameters())


@both
def test_customary_targets_are_the_architecture_s(llama, kind):
    model = deltaw.get_peft_model(llama, getattr(deltaw, kind)())
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert model.base_model.prefix == {"LoHaConfig": "hada_", "LoKrConfig": "lokr_"}[kind]


def test_the_configs_say_what_they_are():
    assert LoHaConfig().peft_type == LoHaConfig().method == "LOHA"
    assert LoKrConfig().peft_type == LoKrConfig().method == "LOKR"
    assert set(LoHaConfig().to_dict()) == set(peft.LoHaConfig().to_dict())
    assert set(LoKrConfig().to_dict()) == set(peft.LoKrConfig().to_dict())
