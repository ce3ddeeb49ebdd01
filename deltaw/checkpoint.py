"""Adapters on disk: ``adapter_config.json`` + ``adapter_model.safetensors``, PEFT's format, strict both ways.

Works on any module that carries adapters; knows nothing of PeftModel. Writing is atomic: each file is written
beside its place and renamed, so that a crash leaves the old file or the new one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deltaw.adapters import HostLayer, ModulesToSaveWrapper, PeftConfig, trained_biases
from deltaw.adapters.config import find_file
from deltaw.adapters.inject import carriers
from deltaw.errors import CheckpointError, did_you_mean
from deltaw.modules import name_of

__all__ = ["WEIGHTS_NAME", "adapter_tensors", "load_tensors", "read_tensors", "save_adapter"]

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."

log = logging.getLogger("deltaw")


def adapter_tensors(
    model: nn.Module, name: str, config: PeftConfig, *, embeddings: bool = False
) -> dict[str, nn.Parameter | Tensor]:
    """PEFT's key -> the live tensor, for all that belongs to adapter ``name`` of ``model`` (the unwrapped
    base).

    Args:
        embeddings: the base's input embedding and output head too (after the vocabulary was resized).
    """
    return {PREFIX + key: tensor for key, tensor in _named_tensors(model, name, config, embeddings)}


def _named_tensors(
    model: nn.Module, name: str, config: PeftConfig, embeddings: bool
) -> Iterator[tuple[str, nn.Parameter | Tensor]]:
    for path, carrier in carriers(model):
        if isinstance(carrier, HostLayer):
            if name in carrier.adapters:
                for key, parameter in carrier.adapters[name].named_parameters():
                    yield f"{path}.{key}", parameter
        elif name in carrier.modules_to_save:
            for key, tensor in carrier.modules_to_save[name].state_dict(keep_vars=True).items():
                yield f"{path}.{key}", tensor
    yield from trained_biases(model, config)
    if embeddings:
        yield from _embeddings(model)


def _embeddings(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        if module is None or isinstance(module, ModulesToSaveWrapper):
            continue
        path = name_of(model, module)
        if path is not None:
            yield (
                f"{path}.base_layer.weight" if isinstance(module, HostLayer) else f"{path}.weight",
                module.weight,
            )


def save_adapter(
    model: nn.Module,
    name: str,
    config: PeftConfig,
    folder: str | os.PathLike[str],
    *,
    embeddings: bool | str = "auto",
) -> None:
    """Writes adapter ``name`` into ``folder`` (config with ``inference_mode`` true, weights), each file
    atomically.

    Args:
        embeddings: save the base's embedding and head too; ``"auto"``: when the vocabulary is not the base's
            any more.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if embeddings == "auto":
        embeddings = _vocabulary_changed(model, config)
    live = adapter_tensors(model, name, config, embeddings=bool(embeddings))
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in live.items()}
    seen: dict[int, str] = {}
    for key, tensor in tensors.items():
        if tensor.data_ptr() in seen and tensor.numel():  # tied weights: the format wants each its own memory
            tensors[key] = tensor.clone()
        seen[tensor.data_ptr()] = key
    part = folder / f".{WEIGHTS_NAME}.{os.getpid()}.part"
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, folder / WEIGHTS_NAME)
    finally:
        part.unlink(missing_ok=True)
    config.save_pretrained(folder, inference_mode=True)


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
    embeddings = {PREFIX + key: tensor for key, tensor in _embeddings(model)}
    places = {**{key: t for key, t in embeddings.items() if key in tensors}, **own}
    missing, extra = [k for k in places if k not in tensors], [k for k in tensors if k not in places]
    faults = [f"missing: {key}{did_you_mean(key, extra, n=1)}" for key in missing]
    for key, tensor in tensors.items():
        if key not in places:
            faults.append(f"no place for: {key}{did_you_mean(key, missing or places, n=1)}")
        elif tensor.shape != places[key].shape:
            faults.append(f"shape of {key}: {tuple(tensor.shape)} in the file, {tuple(places[key].shape)} in the model")
        elif tensor.is_floating_point() != places[key].is_floating_point():
            faults.append(f"dtype of {key}: {tensor.dtype} in the file, {places[key].dtype} in the model")
        elif tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            faults.append(f"not finite: {key} holds NaN or infinity")
    if faults:
        shown = "\n".join(f"  - {fault}" for fault in faults[:40])
        more = f"\n  ... and {len(faults) - 40} more" if len(faults) > 40 else ""
        raise CheckpointError(f"{where} does not fit {type(model).__name__} ({len(faults)} faults):\n{shown}{more}")
    for key, place in places.items():
        if key in embeddings and not torch.equal(place, tensors[key].to(place)):
            log.warning("%s brings its own %s, which takes the place of the base's", where, key.removeprefix(PREFIX))
        if place.is_meta:
            _materialise(model, key.removeprefix(PREFIX), name, place, tensors[key])
        else:
            place.copy_(tensors[key])


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
