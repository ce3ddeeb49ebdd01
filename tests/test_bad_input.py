"""What goes wrong leaves the model as it was, bit for bit and module for module: over every method there is.

A failure is made half-way through an injection, in every way in which a file can be wrong, and in the middle of a save.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import SMALL
from peer import close, stir
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltaw
from deltaw import PeftModel
from deltaw.adapters import ADAPTERS, HostLayer, ModulesToSaveWrapper, TokenHost
from deltaw.errors import AdapterError, CheckpointError, ConfigError
from deltaw.methods import METHODS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: their factors start in the base weight, which has no more singular values than its smaller side
DECOMPOSED = {"pissa", "olora"}

methods = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    """One layer of each kind, and a head that methods leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.first(self.embedding(ids)))
        return self.head(self.last(self.drop(self.conv(x.transpose(1, 2)).transpose(1, 2)).relu()))


def net() -> Net:
    """The same weights at each call; partly frozen and partly in training, so that a change of either shows."""
    torch.manual_seed(0)
    made = Net().eval()
    made.drop.train()
    made.norm.weight.requires_grad_(False)
    return made


IDS = torch.tensor([[1, 5, 3, 9], [2, 2, 10, 0]])


def run(model: nn.Module) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        out = model(IDS)
    for module, mode in modes:
        module.training = mode
    return out


def make(method: str, **more: Any) -> Any:
    chosen = METHODS[method]
    return getattr(deltaw, chosen.config)(**{**SMALL[chosen.config], **chosen.fixes, **more})


@functools.cache
def layers_of(method: str) -> tuple[str, ...]:
    """The layers of Net that the method adapts."""
    found = []
    for layer in ("embedding", "first", "conv", "last"):
        try:
            deltaw.get_peft_model(net(), make(method, target_modules=[layer]))
            found.append(layer)
        except ConfigError:
            continue
    return tuple(found)


def config(method: str, **more: Any) -> Any:
    """On every layer that the method can, with a module trained whole."""
    return make(method, **{"target_modules": list(layers_of(method)), "modules_to_save": ["head"], **more})


def adapted(method: str, name: str = "default", **more: Any) -> PeftModel:
    base, made = net(), config(method, **more)
    torch.manual_seed(1)
    return stir(deltaw.get_peft_model(base, made, name), 0.2, name)


def put(model: nn.Module, made: Any) -> None:
    """A new adapter on ``model``, bare or not."""
    if isinstance(model, PeftModel):
        model.add_adapter("new", made)
    else:
        deltaw.get_peft_model(model, made)


def load(model: nn.Module, folder: Any, low: bool) -> None:
    if isinstance(model, PeftModel):
        model.load_adapter(folder, "new", low_cpu_mem_usage=low)
    else:
        PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=low)


class Snapshot:
    """All that must be the same after a failure: the very modules, the very tensors and their bits, flags and modes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = self._modules()
        self.tensors = self._tensors()
        self.bits = [tensor.detach().clone() for _, tensor, _ in self.tensors]
        self.rest = self._rest()

    def _modules(self) -> list[Any]:
        return [(name, module, type(module), module.training) for name, module in self.model.named_modules()]

    def _tensors(self) -> list[Any]:
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        return [(name, tensor, tensor.requires_grad) for name, tensor in named]

    def _rest(self) -> Any:
        hosts = [
            (name, m.active_adapters, list(m.adapters), list(m.merged_adapters), m.disable_adapters)
            for name, m in self.model.named_modules()
            if isinstance(m, HostLayer)
        ]
        slots = [
            (name, slot, list(held))
            for name, m in self.model.named_modules()
            for slot, held in vars(m).items()
            if isinstance(held, dict) and slot not in ("_parameters", "_modules", "_buffers") and held
        ]
        if not isinstance(self.model, PeftModel):
            return hosts, slots
        configs = {name: c.to_dict() for name, c in self.model.peft_config.items()}
        return hosts, slots, configs, self.model.active_adapters, self.model.base_model.prefix

    def assert_same(self) -> None:
        assert [(n, id(m), k, t) for n, m, k, t in self._modules()] == [(n, id(m), k, t) for n, m, k, t in self.modules]
        now = self._tensors()
        assert [(n, id(t), flag) for n, t, flag in now] == [(n, id(t), flag) for n, t, flag in self.tensors]
        assert all(torch.equal(t, bits) for (_, t, _), bits in zip(now, self.bits, strict=True))
        assert self._rest() == self.rest


def beside(method: str, state: str = "active") -> PeftModel:
    """A model with a trained adapter of another method, in some state."""
    other = "lora" if method == "loha" else "loha"  # which share a layer with any
    model = adapted(other, "first_one", modules_to_save=None)
    if state == "merged":
        model.merge_adapter()
    elif state == "disabled":
        model.base_model.disable_adapter_layers()
    return model


@functools.cache
def takes_merged(method: str) -> bool:
    """Whether the method can begin on a base with something merged into it: some read the weight as it is."""
    try:
        put(beside(method, "merged"), config(method))
    except AdapterError as error:
        if "are merged into it; call unmerge_adapter() first" not in str(error):
            raise
        return False
    return True


# --- the methods that are run through -----------------------------------------------------------------------------


def test_no_method_of_the_registry_is_left_out():
    assert {make(method).method for method in METHODS} == set(ADAPTERS)
    assert all({"first", "last"} <= set(layers_of(method)) for method in METHODS)


# --- an injection that fails half-way -----------------------------------------------------------------------------


def failing(function: Callable[..., Any], at: int, calls: list[int], late: bool) -> Callable[..., Any]:
    """``function``, which fails at its call number ``at``: before it did anything, or after."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= at:
            return function(*args, **kwargs)
        if late:
            function(*args, **kwargs)
        raise RuntimeError("out of luck")

    return fail


@methods
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_layer_that_cannot_be_made_takes_the_others_back(method, late, monkeypatch):
    made = config(method)
    states = ["active", "disabled", "merged"] if takes_merged(method) else ["active", "disabled"]
    for at in range(len(layers_of(method))):
        for model in (net(), *(beside(method, state) for state in states)):
            before, out, calls = Snapshot(model), run(model), []
            with monkeypatch.context() as patch:
                for adapter in set(ADAPTERS[made.method].values()):
                    patch.setattr(adapter, "create", failing(adapter.create, at, calls, late))
                with pytest.raises(RuntimeError, match="out of luck"):
                    put(model, made)
            assert len(calls) > at
            before.assert_same()
            assert torch.equal(run(model), out)


@methods
@pytest.mark.parametrize("last", [ModulesToSaveWrapper, TokenHost], ids=lambda kind: kind.__name__)
def test_what_comes_last_takes_everything_back(method, last, monkeypatch):
    """The copy of a whole module, and rows of tokens: by then every layer has its adapter."""
    more: dict[str, Any] = {"target_modules": [layer for layer in layers_of(method) if layer != "embedding"]}
    if last is TokenHost:
        if "trainable_token_indices" not in trainable_fields(method):
            pytest.skip("the method has no rows of tokens")
        more["trainable_token_indices"] = {"embedding": [1]}
    for model in (net(), beside(method)):
        before = Snapshot(model)
        with monkeypatch.context() as patch:
            patch.setattr(last, "add", failing(last.add, 0, [], False))
            with pytest.raises(RuntimeError, match="out of luck"):
                put(model, config(method, **more))
        before.assert_same()


def trainable_fields(method: str) -> set[str]:
    """The config's fields that the method acts on."""
    made = make(method)
    return set(made.to_dict()) - set(made.unsupported)


@methods
def test_a_wrong_config_changes_nothing(method):
    wrong = [
        {"target_modules": ["first", "lst"]},
        {"target_modules": ["first", "norm"]},
        {"modules_to_save": ["haed"]},
        {"exclude_modules": ["first", "last", "conv", "embedding"]},
        {"layers_to_transform": [7]},
        {"rank_pattern": {"nowhere": 2}},
        {"trainable_token_indices": [99]},
    ]
    for fields in wrong:
        if fields.keys() <= trainable_fields(method):
            for model in (net(), beside(method)):
                before = Snapshot(model)
                with pytest.raises(ConfigError):
                    put(model, config(method, **fields))
                before.assert_same()


@methods
def test_a_rank_larger_than_the_layer(method):
    """Wasteful, but what the other methods compute is still right; a decomposition has no such rank to give."""
    fields = {"init_r": 12, "target_r": 10} if METHODS[method].config == "AdaLoraConfig" else {"r": 12}
    model = net()
    before = Snapshot(model)
    if method in DECOMPOSED:
        with pytest.raises(ConfigError, match=r"r=12 on '(first|last)', which is .*lower r"):
            deltaw.get_peft_model(model, config(method, **fields))
        before.assert_same()
        return
    base = run(model)
    wide = deltaw.get_peft_model(model, config(method, **fields))
    assert close(run(wide), base, 1e-6)
    out = run(stir(wide, 0.2))
    assert not close(out, base, 1e-2)
    assert close(run(wide.merge_and_unload()), out, 1e-5)


# --- files that are wrong -----------------------------------------------------------------------------------------


def edit(folder: Any, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def key_of(tensors: dict[str, Tensor]) -> str:
    return sorted(key for key in tensors if ".last." in key)[0]


def set_one(tensors: dict[str, Tensor], value: Callable[[Tensor], Tensor]) -> None:
    key = key_of(tensors)
    tensors[key] = value(tensors[key]).contiguous()


def filled(number: float) -> Callable[[Tensor], Tensor]:
    def fill(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        out.view(-1)[-1] = number
        return out

    return fill


def in_config(**values: Any) -> Callable[[Any], None]:
    def change(folder: Any) -> None:
        held = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**held, **values}))

    return change


def of_another_method(folder: Any) -> None:
    """The config of the next method, on the same layers."""
    held = json.loads((folder / CONFIG).read_text())
    names = [name for name in METHODS if make(name).peft_type != held["peft_type"]]
    other = make(names[0], target_modules=["first", "last"], modules_to_save=["head"])
    other.save_pretrained(folder)


def truncated(folder: Any) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


#: what is wrong with a folder -> (how it is made so, words of the error)
DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a tensor is missing": (lambda f: edit(f, lambda t: t.pop(key_of(t))), r"missing: base_model.model.last\."),
    "a tensor too many": (
        lambda f: edit(f, lambda t: t.update({"base_model.model.norm.lora_A.weight": torch.ones(2, 2)})),
        "no place for: base_model.model.norm.lora_A.weight",
    ),
    "a tensor of another layer": (
        lambda f: edit(f, lambda t: t.update({key_of(t).replace(".last.", ".lsat."): t.pop(key_of(t))})),
        r"(?s)missing: base_model.model.last\..*no place for: base_model.model.lsat\.",
    ),
    "a wrong shape": (
        lambda f: edit(f, lambda t: set_one(t, lambda x: torch.cat([x, x]))),
        r"shape of base_model.model.last\..* in the file, .* in the model",
    ),
    "a wrong number of dimensions": (
        lambda f: edit(f, lambda t: set_one(t, lambda x: x[None])),
        r"shape of base_model.model.last\.",
    ),
    "NaN": (lambda f: edit(f, lambda t: set_one(t, filled(float("nan")))), r"not finite: base_model.model.last\."),
    "infinity": (lambda f: edit(f, lambda t: set_one(t, filled(float("inf")))), r"not finite: base_model.model.last\."),
    "integers": (lambda f: edit(f, lambda t: set_one(t, lambda x: x.long())), r"dtype of base_model.model.last\."),
    "the whole module is missing": (
        lambda f: edit(f, lambda t: t.pop("base_model.model.head.weight")),
        "missing: base_model.model.head.weight",
    ),
    "no tensors": (lambda f: edit(f, lambda t: t.clear()), "missing"),
    "half a file": (truncated, "is damaged or no safetensors file"),
    "no file": (lambda f: (f / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"holds no {CONFIG}"),
    "a config that is no JSON": (lambda f: (f / CONFIG).write_text("{"), "not valid JSON"),
    "an unknown method": (in_config(peft_type="LORO"), "'LORO' is not a method"),
    "an unknown setting": (in_config(use_magic=True), "use_magic"),
    "a setting of another type": (in_config(target_modules=3), "target_modules=3"),
    "targets that match nothing": (in_config(target_modules=["nowhere"]), "match no layer"),
    "a config of another method": (of_another_method, "it has none of .*'s tensors: is its config another adapter's"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Any]:
    @functools.cache
    def folder(method: str) -> Any:
        path = tmp_path_factory.mktemp(method)
        adapted(method).save_pretrained(path)
        return path

    return folder


@methods
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_file_is_one_clear_error_and_changes_nothing(method, damage, saved, tmp_path):
    apply, words = DAMAGES[damage]
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (WEIGHTS, CONFIG):
        (folder / file).write_bytes((saved(method) / file).read_bytes())
    apply(folder)
    for model, low in ((net(), False), (beside(method, "merged" if takes_merged(method) else "active"), True)):
        before, out = Snapshot(model), run(model)
        with pytest.raises((CheckpointError, ConfigError), match=words):
            load(model, folder, low)
        before.assert_same()
        assert torch.equal(run(model), out)


@methods
def test_all_faults_of_a_file_are_in_one_error(method, saved, tmp_path):
    tensors = load_file(saved(method) / WEIGHTS)
    first, second, *_ = sorted(key for key in tensors if ".last." in key or ".first." in key)
    tensors["base_model.model.head.weight"][0, 0] = float("nan")
    tensors["nonsense"] = tensors.pop(first)
    tensors[second] = torch.zeros(1, 2, 3)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_bytes((saved(method) / CONFIG).read_bytes())
    with pytest.raises(CheckpointError, match=r"\(4 faults\)") as error:
        PeftModel.from_pretrained(net(), tmp_path)
    for word in (
        f"missing: {first}",
        "no place for: nonsense",
        f"shape of {second}",
        "not finite: base_model.model.head",
    ):
        assert word in str(error.value)


# --- a save that is interrupted -----------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("step", ["deltaw.checkpoint.save_file", *range(5)])
def test_a_save_that_fails_leaves_the_old_adapter(method, step, tmp_path, monkeypatch):
    """Whole, and with nothing beside it, whichever of its renames fails."""
    old, model = adapted(method), stir(adapted(method), 0.3)
    old.save_pretrained(tmp_path / "folder")
    before = Snapshot(model)
    expected = {p.name: p.read_bytes() for p in (tmp_path / "folder").iterdir()}
    with monkeypatch.context() as patch:
        if isinstance(step, str):
            patch.setattr(step, failing(save_file, 0, [], False))
        else:
            patch.setattr(os, "replace", failing(os.replace, step, [], False))
        with pytest.raises(RuntimeError, match="out of luck"):
            model.save_pretrained(tmp_path / "folder")
    before.assert_same()
    assert {p.name: p.read_bytes() for p in (tmp_path / "folder").iterdir()} == expected
    back = PeftModel.from_pretrained(net(), tmp_path / "folder")
    assert close(run(back), run(old), 1e-5)


# --- what must work for every method ------------------------------------------------------------------------------


@methods
def test_loading_on_the_meta_device_is_loading(method, saved):
    plain = PeftModel.from_pretrained(net(), saved(method))
    low = PeftModel.from_pretrained(net(), saved(method), low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in (*low.parameters(), *low.buffers()))
    mine, theirs = dict(low.named_parameters()), dict(plain.named_parameters())
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(run(low), run(plain))
    assert close(run(plain), run(adapted(method)), 1e-5)
    assert close(run(low.merge_and_unload()), run(plain), 1e-5)


@methods
@pytest.mark.parametrize("low", [False, True])
def test_loading_beside_another_and_deleting(method, low, saved):
    model = beside(method)
    before, out = Snapshot(model), run(model)
    model.load_adapter(saved(method), "new", low_cpu_mem_usage=low)
    assert model.active_adapters == ["first_one"]
    assert torch.equal(run(model), out)
    model.set_adapter("new")
    assert close(run(model), run(adapted(method)), 1e-5)
    model.set_adapter("first_one")
    assert torch.equal(run(model), out)
    model.delete_adapter("new")
    before.assert_same()


@methods
def test_unloading_gives_the_very_base_back(method):
    base = net()
    before = Snapshot(base)
    model = stir(deltaw.get_peft_model(base, config(method)), 0.2)
    model.merge_adapter()
    plain = model.unload()
    assert plain is base
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    for parameter, (_, _, flag) in zip(base.parameters(), before.tensors, strict=True):
        parameter.requires_grad_(flag)  # unload() freezes: all else is as before
    before.assert_same()


@methods
def test_copies_share_nothing(method):
    model = adapted(method)
    out, other = run(model), copy.deepcopy(model)
    assert close(run(other), out, 1e-6)
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert list(mine) == list(theirs)
    assert not any(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    stir(other, 1.0)
    assert torch.equal(run(model), out)
    assert not close(run(other), out, 1e-2)
    other.delete_adapter("default")
    left = other.get_base_model().state_dict()
    assert list(left) == list(net().state_dict())
    assert all(torch.equal(left[name], tensor) for name, tensor in net().state_dict().items())
    assert torch.equal(run(model), out)


@methods
def test_configs_can_be_pickled(method):
    for one in (config(method), adapted(method).peft_config["default"]):
        back = pickle.loads(pickle.dumps(one))
        assert type(back) is type(one)
        assert back == one
        assert back.to_dict() == one.to_dict()
        assert copy.deepcopy(one) == one


# --- methods beside each other ------------------------------------------------------------------------------------


#: methods that keep parameters of the same names in different forms, as in PEFT
APART = {frozenset(("adalora", name)) for name in METHODS if METHODS[name].config == "LoraConfig"}


@pytest.mark.parametrize(("one", "two"), list(itertools.permutations(METHODS, 2)))
def test_two_methods_on_one_model(one, two):
    """Each alone computes what it does in a model of its own. Together they add up: merged, the model is the same."""
    model = adapted(one, "a", modules_to_save=None)
    before = Snapshot(model)
    torch.manual_seed(1)
    if frozenset((one, two)) in APART:
        with pytest.raises(AdapterError, match="the two cannot share a layer"):
            model.add_adapter("b", config(two, modules_to_save=None))
        before.assert_same()
        return
    model.add_adapter("b", config(two, modules_to_save=None))
    model.set_adapter("b")
    stir(model, 0.2, "b")
    outs = {}
    for name, method in (("a", one), ("b", two)):
        model.set_adapter(name)
        outs[name] = run(model)
        assert close(outs[name], run(adapted(method, name, modules_to_save=None)), 1e-5)
    model.set_adapter(["a", "b"], inference_mode=True)
    together = run(model)
    assert not close(together, outs["a"], 1e-3)
    assert not close(together, outs["b"], 1e-3)
    bits = Snapshot(model)
    model.merge_adapter()
    assert close(run(model), together, 1e-4)
    model.unmerge_adapter()
    bits.assert_same()
    assert torch.equal(run(model), together)


# --- links --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_link_out_of_the_folder_is_refused_and_the_hubs_cache_is_not(file, saved, tmp_path):
    """The cache links ``snapshots/REVISION/FILE`` to ``blobs/HASH``; any other link out was put there by someone."""
    files = {p.name: p.read_bytes() for p in saved("lora").iterdir() if p.is_file()}
    cache = tmp_path / "models--me--adapter"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, data in files.items():
        (blobs / name).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    PeftModel.from_pretrained(net(), snapshot)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(files[file])
    (snapshot / file).unlink()
    (snapshot / file).symlink_to(elsewhere)
    base = net()
    before = Snapshot(base)
    with pytest.raises(CheckpointError, match="leads out of the adapter's folder"):
        PeftModel.from_pretrained(base, snapshot)
    before.assert_same()
