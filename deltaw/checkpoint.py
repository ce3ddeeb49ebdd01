"""Adapters on disk: ``adapter_config.json`` + ``adapter_model.safetensors``, PEFT's format, strict both ways.

Works on any module that carries adapters; knows nothing of PeftModel. Writing is atomic: a crash leaves the old
adapter, the new one, or, in the moment between, a folder that no reader takes for an adapter; never weights under
another's config.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Container, Iterator
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deltaw.adapters import (
    Adapter,
    HostLayer,
    ModulesToSaveWrapper,
    PeftConfig,
    adapters_named,
    host_layers,
    trained_biases,
)
from deltaw.adapters.config import find_file
from deltaw.adapters.inject import carriers
from deltaw.atomic import publishing
from deltaw.errors import CheckpointError, did_you_mean
from deltaw.modules import name_of, split_name
from deltaw.weights import is_finite

__all__ = ["WEIGHTS_NAME", "adapter_tensors", "load_tensors", "read_tensors", "save_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
#: what PEFT calls an embedding when it decides what to save
EMBEDDING_NAMES = ("embed_tokens", "lm_head")

log = logging.getLogger("deltaw")


def adapter_tensors(
    model: nn.Module,
    name: str,
    config: PeftConfig,
    *,
    embeddings: bool | str = False,
    as_saved: bool = False,
    convert: bool = True,
) -> dict[str, Tensor]:
    """PEFT's key -> the live tensor, for all that belongs to adapter ``name`` of ``model`` (the unwrapped
    base).

    Args:
        embeddings: the base's input embedding and output head too; ``"auto"``: those that carry the adapter (unless
            only rows of them train), and both after the vocabulary was resized.
        as_saved: in the form that a file holds, where a method writes another one than it trains.
        convert: of two forms that a file may hold, the plain LoRA.
    """
    form = ("file_tensors" if convert else "unconverted_tensors") if as_saved else "places"
    named = _named_tensors(model, name, config, embeddings, methodcaller(form))
    return {PREFIX + key: tensor for key, tensor in named}


def _named_tensors(
    model: nn.Module, name: str, config: PeftConfig, embeddings: bool | str, of: Callable[[Adapter], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    for path, carrier in carriers(model):
        if isinstance(carrier, HostLayer):
            if name in carrier.adapters:
                for key, tensor in of(carrier.adapters[name]).items():
                    yield f"{path}.{key}", tensor
        elif name in carrier.modules_to_save:
            for key, tensor in carrier.modules_to_save[name].state_dict(keep_vars=True).items():
                yield f"{path}.{key}", tensor
    yield from trained_biases(model, config)
    if embeddings == "auto":
        yield from _kept_embeddings(model, name, config)
    elif embeddings:
        yield from _embeddings(model)


def _embeddings(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(key, live tensor) of the base's input embedding and output head."""
    for path, module in _embedding_layers(model):
        yield from _base_tensors(path, module)


def _embedding_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        path = None if module is None or isinstance(module, ModulesToSaveWrapper) else name_of(model, module)
        if module is not None and path is not None:
            yield path, module


def _base_tensors(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    base, place = (module.base_layer, _base_path(path, module)) if isinstance(module, HostLayer) else (module, path)
    for key, parameter in base.named_parameters():
        yield f"{place}.{key}", parameter


def _base_path(path: str, host: HostLayer) -> str:
    return f"{path}.{name_of(host, host.base_layer)}"


def _kept_embeddings(model: nn.Module, name: str, config: PeftConfig) -> Iterator[tuple[str, Tensor]]:
    """What ``"auto"`` means, by PEFT's rule and its names."""
    resized = _vocabulary_changed(model, config)
    some_rows = getattr(config, "trainable_token_indices", None) is not None
    for path, module in _embedding_layers(model):
        adapted = isinstance(module, HostLayer) and name in module.adapters
        if resized or (adapted and not some_rows and split_name(path)[1] in EMBEDDING_NAMES):
            yield from _base_tensors(path, module)


def save_adapter(
    model: nn.Module,
    name: str,
    config: PeftConfig,
    folder: str | os.PathLike[str],
    *,
    embeddings: bool | str = "auto",
    convert: bool = True,
) -> None:
    """Writes adapter ``name`` into ``folder`` (config with ``inference_mode`` true, weights), both or neither.

    Args:
        embeddings: save the base's embedding and head too; see :func:`adapter_tensors`.
        convert: write plain LoRA where the method can; otherwise in the form that was trained.
    """
    adapters = adapters_named(model, name)
    for method in {type(adapter) for adapter in adapters.values()}:
        config = (method.file_config if convert else method.unconverted_config)(config, adapters)
    live = adapter_tensors(model, name, config, embeddings=embeddings, as_saved=True, convert=convert)
    live.update(_under_merged(model, live))  # the file is for a base without it
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in live.items()}
    seen: dict[int, str] = {}
    for key, tensor in tensors.items():
        if tensor.data_ptr() in seen and tensor.numel():  # tied weights: the format wants each its own memory
            tensors[key] = tensor.clone()
        seen[tensor.data_ptr()] = key
    with publishing(folder) as staged:
        weights = staged / WEIGHTS_NAME
        weights.touch()
        mode = weights.stat().st_mode  # what the umask makes of a new file; save_file's own is private to its owner
        save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(mode)
        config.save_pretrained(staged, inference_mode=True)


def _under_merged(model: nn.Module, keys: Container[str]) -> dict[str, Tensor]:
    """Those of ``keys`` that are base weights with adapters merged into them, and the weights without."""
    merged = {f"{PREFIX}{_base_path(path, host)}.weight": host for path, host in host_layers(model) if host.merged}
    return {key: host.bare_weight() for key, host in merged.items() if key in keys}


def _vocabulary_changed(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the model's vocabulary differs from that of the base on disk (only a local base can be
    asked)."""
    ours = getattr(getattr(model, "config", None), "vocab_size", None)
    path = Path(str(config.base_model_name_or_path or "")) / "config.json"
    if ours is None or not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("vocab_size", ours) != ours
    except (OSError, ValueError):
        return False


def read_tensors(
    name: str | os.PathLike[str], *, subfolder: str | None = None, device: str = "cpu", **hub: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter folder or hub id.

    Raises:
        CheckpointError: no weights, pickled weights, or a damaged file.
    """
    folder = Path(name).expanduser() / (subfolder or "")
    if folder.is_dir() and not (folder / WEIGHTS_NAME).is_file() and (folder / PICKLE_NAME).is_file():
        raise CheckpointError(
            f"{folder / PICKLE_NAME} is a pickle, which can run code when it is read, so it is refused. "
            f'If you trust it, convert it once: python -c "import torch; '
            f"from safetensors.torch import save_file; "
            f"save_file(torch.load('{folder / PICKLE_NAME}', weights_only=True), '{folder / WEIGHTS_NAME}')\""
        )
    path = find_file(name, WEIGHTS_NAME, subfolder, hub)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); save or fetch it again") from error


@torch.no_grad()
def load_tensors(model: nn.Module, name: str, config: PeftConfig, tensors: dict[str, Tensor], where: str) -> None:
    """Copies ``tensors`` into adapter ``name`` of ``model``; checks all of them first, so a refusal changes
    nothing.

    Every tensor of the file must find its place and every adapter parameter its tensor. Values are cast to
    the dtype of the parameter; a parameter on the meta device is replaced by the tensor itself.

    Raises:
        CheckpointError: lists every missing, extra, misshapen and non-finite tensor at once.
    """
    own = adapter_tensors(model, name, config)
    tensors = _as_placed(model, name, tensors)
    embeddings = {PREFIX + key: tensor for key, tensor in _embeddings(model)}
    places = {**{key: t for key, t in embeddings.items() if key in tensors}, **own}
    merged = _under_merged(model, tensors)
    first = {id(place): key for key, place in reversed(places.items())}  # the first of several names for one place
    missing, extra = [k for k in places if k not in tensors], [k for k in tensors if k not in places]
    faults = [f"missing: {key}{did_you_mean(key, extra, n=1)}" for key in missing]
    for key, tensor in tensors.items():
        if key not in places:
            faults.append(f"no place for: {key}{did_you_mean(key, missing or places, n=1)}")
        elif tensor.shape != places[key].shape:
            faults.append(f"shape of {key}: {tuple(tensor.shape)} in the file, {tuple(places[key].shape)} in the model")
        elif tensor.is_floating_point() != places[key].is_floating_point():
            faults.append(f"dtype of {key}: {tensor.dtype} in the file, {places[key].dtype} in the model")
        elif tensor.is_floating_point() and not is_finite(tensor):
            faults.append(f"not finite: {key} holds NaN or infinity")
        elif not torch.equal(tensor, tensors.get(first[id(places[key])], tensor)):
            faults.append(
                f"{key} differs from {first[id(places[key])]}, but here they are tied and hold one value; "
                "load it on a base that is not tied, or without ensure_weight_tying and with both layers named"
            )
        elif key in merged and not torch.equal(tensor.to(merged[key]), merged[key]):
            faults.append(f"{key} is not the base's, which has adapters merged into it; call unmerge_adapter() first")
    if faults:
        method = {f"{PREFIX}{path}.{k}" for path, a in adapters_named(model, name).items() for k in a.places()}
        none = f"; it has none of {config.method}'s tensors: is its config another adapter's?"
        shown = "\n".join(f"  - {fault}" for fault in faults[:40])
        more = f"\n  ... and {len(faults) - 40} more" if len(faults) > 40 else ""
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__} ({len(faults)} faults"
            f"{none if method.isdisjoint(tensors) else ''}):\n{shown}{more}"
        )
    for key, place in places.items():
        if key in merged or first[id(place)] != key:
            continue  # it holds the value already
        if key in embeddings and not torch.equal(place, tensors[key].to(place)):
            log.warning("%s brings its own %s, which takes the place of the base's", where, key.removeprefix(PREFIX))
        if place.is_meta:
            _materialise(model, key.removeprefix(PREFIX), name, place, tensors[key])
        else:
            place.copy_(tensors[key])


def _as_placed(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors in the form of the parameters that they fill, layer by layer."""
    placed = dict(tensors)
    for path, host in host_layers(model):
        if name in host.adapters:
            layer = f"{PREFIX}{path}."
            own = {key.removeprefix(layer): placed.pop(key) for key in list(placed) if key.startswith(layer)}
            placed.update({layer + key: tensor for key, tensor in host.adapters[name].from_file(own).items()})
    return placed


def _materialise(model: nn.Module, key: str, adapter: str, place: Tensor, value: Tensor) -> None:
    """Gives a parameter made on the meta device its memory, on the device of the layer it adapts."""
    for path, carrier in carriers(model):
        if not key.startswith(f"{path}.") or not isinstance(carrier, HostLayer):
            continue
        for module in carrier.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is place:
                    filled = value.to(carrier.store.device, place.dtype, copy=True)
                    module._parameters[attribute] = nn.Parameter(filled, requires_grad=place.requires_grad)
                    return
    raise CheckpointError(f"no layer of {type(model).__name__} holds {key} of adapter {adapter!r}")
