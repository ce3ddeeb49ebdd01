"""How a model with adapters stands, layer by layer and as a whole: what is active, merged, trainable, and where.

PEFT's functions and their fields. For reading; nothing here changes a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from deltaw.adapters import HostLayer, ModulesToSaveWrapper
from deltaw.adapters.inject import carriers
from deltaw.errors import AdapterError
from deltaw.modules import parameter_sizes

__all__ = ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]

Irregular = Literal["irregular"]


@dataclasses.dataclass
class TunerLayerStatus:
    """One layer that carries adapters, or one module that is trained whole.

    Args:
        requires_grad: adapter name -> whether its parameters train; ``"irregular"`` when some do.
        devices: adapter name -> types of the devices that hold it.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclasses.dataclass
class TunerModelStatus:
    """The whole model; ``"irregular"`` where its layers do not agree."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None = None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """One entry for each layer that carries adapters, in the order of ``named_modules``.

    Raises:
        AdapterError: there is none.
    """
    base = _base_of(model)
    found = [_layer_status(f"model.{name}" if base is not model else name, m) for name, m in carriers(base)]
    if not found:
        raise AdapterError(f"{type(model).__name__} has no layer with an adapter; make one with get_peft_model()")
    return found


def _layer_status(name: str, carrier: HostLayer | ModulesToSaveWrapper) -> TunerLayerStatus:
    held: dict[str, list[nn.Parameter]]
    if isinstance(carrier, HostLayer):
        held = {n: list(adapter.parameters()) for n, adapter in carrier.adapters.items()}
    else:
        held = {n: list(module.parameters()) for n, module in carrier.modules_to_save.items()}
    own = {n: parameters for n, parameters in held.items() if parameters}  # tied layers share those of another
    return TunerLayerStatus(
        name=name,
        module_type=type(carrier).__name__,
        enabled=not carrier._disabled,
        active_adapters=list(carrier.active_adapters),
        merged_adapters=list(carrier.merged_adapters) if isinstance(carrier, HostLayer) else [],
        requires_grad={n: _agreed(p.requires_grad for p in parameters) for n, parameters in own.items()},
        available_adapters=sorted(held),
        devices={n: sorted({p.device.type for p in parameters}) for n, parameters in own.items()},
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the whole model, from :func:`get_layer_status`.

    Raises:
        AdapterError: no layer carries an adapter.
    """
    layers = get_layer_status(model)
    base = _base_of(model)
    configs: dict[str, Any] = getattr(model, "peft_config", {}) if base is not model else {}
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    merged = {name for layer in layers for name in layer.merged_adapters}
    half_merged = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    sizes = parameter_sizes(model)
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(model).__name__ if base is not model else "None",
        peft_types={name: str(config.peft_type) for name, config in configs.items()},
        trainable_params=sum(size for p, size in sizes.items() if p.requires_grad),
        total_params=sum(sizes.values()),
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=active if all(_follows(layer, active) for layer in layers) else "irregular",
        merged_adapters="irregular" if half_merged else sorted(merged),
        requires_grad={
            name: _agreed(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, [])}) for name in names
        },
    )


def _follows(layer: TunerLayerStatus, active: list[str]) -> bool:
    """Whether a layer has those of ``active`` active that it has at all."""
    return set(layer.active_adapters) == set(active) & set(layer.available_adapters)


def _agreed(values: Iterable[Any]) -> Any:
    """What all values are, or ``"irregular"``."""
    listed = list(values)
    return listed[0] if listed and all(value == listed[0] for value in listed) else "irregular"


def _base_of(model: nn.Module) -> nn.Module:
    """The original model of a PeftModel; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model  # type: ignore[operator]
