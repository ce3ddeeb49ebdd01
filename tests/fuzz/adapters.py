"""Hostile adapter folders: cut, flipped, of other shapes and dtypes, not finite, with pickles, with links out."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

import deltaw
from deltaw import PeftModel

from .harness import STRINGS, Tally, attempt, broken_bytes, kind, untouched, values

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    """Two layers, to be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


METHODS: dict[str, Callable[[], deltaw.PeftConfig]] = {
    "lora": lambda: deltaw.LoraConfig(r=2, target_modules=["first", "last"]),
    "dora": lambda: deltaw.LoraConfig(r=2, use_dora=True, bias="all", target_modules=["first", "last"]),
    "whole": lambda: deltaw.LoraConfig(r=2, target_modules=["first"], modules_to_save=["last"]),
    "adalora": lambda: deltaw.AdaLoraConfig(init_r=2, target_r=1, total_step=10, target_modules=["first", "last"]),
    "loha": lambda: deltaw.LoHaConfig(r=2, target_modules=["first", "last"]),
    "lokr": lambda: deltaw.LoKrConfig(r=2, target_modules=["first", "last"]),
}


@cache
def good(method: str = "lora") -> dict[str, bytes]:
    """The files of a sound adapter."""
    model = deltaw.get_peft_model(net(), METHODS[method]())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def put_on(folder: Path, tally: Tally, around: Path | None = None) -> Any:
    """Loads the folder onto a base, which must be as it was where it is refused."""
    base = net()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with untouched(around or folder):
        model = attempt(tally, lambda: PeftModel.from_pretrained(base, folder))
    if model is None:
        after = base.state_dict()
        assert list(after) == list(before), "a refused adapter left layers in the base"
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    else:
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), "a weight that is not finite"
    return model


OF_METHODS = st.sampled_from(sorted(METHODS))


@kind(
    "adapter weights",
    OF_METHODS.flatmap(lambda method: st.tuples(st.just(method), broken_bytes(lambda: good(method)[WEIGHTS]))),
    "the weights' file of every method, damaged",
)
def weights(given: tuple[str, bytes], folder: Path, tally: Tally) -> None:
    method, data = given
    put_on(write(folder / "adapter", {**good(method), WEIGHTS: data}), tally)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.uint8]


def _tensor(shape: list[int], dtype: torch.dtype, fill: float) -> torch.Tensor:
    return torch.full(shape, fill).to(dtype)


TENSORS = st.builds(
    _tensor,
    st.lists(st.integers(0, 7), max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -float("inf"), 1e30]),
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["replace", "remove", "add", "nan", "cast"]), st.integers(0, 50), TENSORS, STRINGS),
    min_size=1,
    max_size=3,
)


@kind(
    "adapter tensors",
    st.tuples(OF_METHODS, CHANGES),
    "wrong shapes and dtypes, missing and extra tensors, NaN and infinity",
)
def tensors(given: tuple[str, list[tuple[str, int, torch.Tensor, str]]], folder: Path, tally: Tally) -> None:
    method, changes = given
    held = load(good(method)[WEIGHTS])
    for what, number, tensor, name in changes:
        if not held:
            break
        key = sorted(held)[number % len(held)]
        if what == "replace":
            held[key] = tensor
        elif what == "remove":
            del held[key]
        elif what == "add":
            held[name.encode("utf-8", "replace").decode() or "x"] = tensor
        elif what == "nan":
            held[key] = held[key].float().clone()
            held[key].flatten()[:1] = float("nan")
        else:
            held[key] = held[key].to(tensor.dtype)
    put_on(write(folder / "adapter", {**good(method), WEIGHTS: save(held)}), tally)


def config_of(changes: dict[str, Any]) -> bytes:
    return json.dumps({**json.loads(good()[CONFIG]), **changes}).encode()


CONFIG_KEYS = st.sampled_from(sorted(deltaw.LoraConfig.__dataclass_fields__))


@kind(
    "adapter config",
    st.one_of(
        broken_bytes(lambda: good()[CONFIG]),
        st.dictionaries(CONFIG_KEYS | STRINGS, values(), min_size=1, max_size=3).map(config_of),
        values().map(lambda value: json.dumps(value).encode()),
    ),
    "adapter_config.json, damaged, or with values of every type",
)
def config(data: bytes, folder: Path, tally: Tally) -> None:
    put_on(write(folder / "adapter", {**good(), CONFIG: data}), tally)


class Bomb:
    """What a pickle may do: here, leave a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.mark,))


LAYOUTS = st.sampled_from(
    """
    pickle only, pickle beside, pickle as weights, pickle as config, link out, config link out, link in, folder link,
    dangling link, loop, folder as weights, folder as config, no config, no weights, empty, extra files, huge header,
    code beside
    """.replace("\n", " ")
    .strip()
    .split(",")
).map(str.strip)


@kind("adapter folders", LAYOUTS, "pickles, links that lead out, loops, folders in place of files, extra files")
def folders(layout: str, folder: Path, tally: Tally) -> None:
    mark, files = folder / "pwned", dict(good())
    bomb = pickle.dumps(Bomb(mark))
    outside = write(folder / "outside", good())
    taken: bool | None = False  # whether it must be loaded; None: either
    if layout == "pickle only":
        files = {CONFIG: files[CONFIG], "adapter_model.bin": bomb}
    elif layout == "pickle beside":
        files, taken = {**files, "adapter_model.bin": bomb}, True
    elif layout == "pickle as weights":
        files[WEIGHTS] = bomb
    elif layout == "pickle as config":
        files[CONFIG] = bomb
    elif layout == "extra files":
        files, taken = {**files, "notes.txt": b"\xff", ".hidden": b"", "training_args.bin": bomb}, True
    elif layout == "code beside":
        code = f"open({str(mark)!r}, 'w')".encode()
        files, taken = {**files, "adapter.py": code, "__init__.py": code, "modeling.py": code}, True
    elif layout == "huge header":
        files[WEIGHTS] = (2**62).to_bytes(8, "little") + files[WEIGHTS][8:]
    elif layout == "empty":
        files = {}
    elif layout in ("link out", "dangling link", "loop", "folder as weights", "no weights", "link in"):
        del files[WEIGHTS]
    elif layout in ("config link out", "folder as config", "no config"):
        del files[CONFIG]
    adapter = write(folder / "adapter", files)
    if layout == "link out":
        (adapter / WEIGHTS).symlink_to(outside / WEIGHTS)
    elif layout == "config link out":
        (adapter / CONFIG).symlink_to(outside / CONFIG)
    elif layout == "link in":
        (adapter / "kept.safetensors").write_bytes(good()[WEIGHTS])
        (adapter / WEIGHTS).symlink_to("kept.safetensors")
        taken = True
    elif layout == "folder link":
        adapter = folder / "link"
        adapter.symlink_to("outside")
        taken = True
    elif layout == "dangling link":
        (adapter / WEIGHTS).symlink_to(folder / "nowhere")
    elif layout == "loop":
        (adapter / WEIGHTS).symlink_to(WEIGHTS)
    elif layout.startswith("folder as"):
        (adapter / (WEIGHTS if layout.endswith("weights") else CONFIG)).mkdir()
    model = put_on(adapter, tally, around=folder)
    assert (model is not None) == taken, f"{layout}: {'refused' if model is None else 'loaded'}"
    assert not mark.exists(), "code that came with an adapter was run"
