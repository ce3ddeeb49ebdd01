"""Puts adapters into a model: layers become hosts, everything else is frozen. A failure leaves the model as it was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer, host_layers
from deltaw.adapters.hosts import host_type
from deltaw.adapters.registry import adapter_class
from deltaw.adapters.saved import ModulesToSaveWrapper
from deltaw.adapters.targets import Targets, resolve
from deltaw.errors import AdapterError
from deltaw.modules import set_submodule

__all__ = [
    "carriers",
    "inject",
    "inject_adapter_in_model",
    "remove_adapter",
    "set_active",
    "trained_biases",
]

log = logging.getLogger("deltaw")


def carriers(model: nn.Module) -> list[tuple[str, HostLayer | ModulesToSaveWrapper]]:
    """(name, module) of everything that holds an adapter's parameters: hosts and wholly trained modules."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, (HostLayer, ModulesToSaveWrapper))]


def inject(
    model: nn.Module,
    config: PeftConfig,
    name: str,
    *,
    strict: bool = True,
    low_cpu_mem_usage: bool = False,
) -> Targets:
    """Adds adapter ``name`` to the layers that ``config`` means. It is not active yet, nothing is frozen yet.

    Args:
        low_cpu_mem_usage: make the adapter's tensors on the meta device, to be filled from a file.

    Raises:
        TargetError, ConfigError, AdapterError: the model is then as it was before.
    """
    if any(name in host.adapters for _, host in host_layers(model)):
        raise AdapterError(f"adapter {name!r} already exists on {type(model).__name__}; delete it or use another name")
    targets = resolve(model, config, strict=strict)
    method = adapter_class(str(config.peft_type))
    try:
        for layer_name, module in targets.adapted.items():
            host = module
            if not isinstance(module, HostLayer):
                made = host_type(module)
                assert made is not None  # resolve() has refused what has no host
                host = made(module)
                host.train(module.training)
                set_submodule(model, layer_name, host)
            assert isinstance(host, HostLayer)
            if low_cpu_mem_usage:
                with torch.device("meta"):
                    host.add(method, name, config, layer_name)
            else:
                host.add(method, name, config, layer_name)
        for saved_name, module in targets.saved.items():
            wrapper = module
            if not isinstance(module, ModulesToSaveWrapper):
                wrapper = ModulesToSaveWrapper(module)
                set_submodule(model, saved_name, wrapper)
            assert isinstance(wrapper, ModulesToSaveWrapper)
            wrapper.add(name)
    except BaseException:
        remove_adapter(model, name)
        raise
    return targets


def remove_adapter(model: nn.Module, name: str) -> None:
    """Takes adapter ``name`` off every layer; a layer left without adapters becomes the plain base layer again."""
    for layer_name, carrier in carriers(model):
        if isinstance(carrier, HostLayer):
            if name in carrier.adapters:
                carrier.remove(name)
            if not carrier.adapters:
                set_submodule(model, layer_name, carrier.base_layer)
        else:
            carrier.remove(name)
            if not len(carrier.modules_to_save):
                set_submodule(model, layer_name, carrier.original_module)


def set_active(model: nn.Module, names: Sequence[str], configs: dict[str, Any], *, trainable: bool = True) -> None:
    """Activates adapters ``names``, freezes all else, and lets the biases train that their configs name."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, carrier in carriers(model):
        carrier.set_active(names, trainable)
    if trainable:
        for name in names:
            for _, bias in trained_biases(model, configs[name]):
                bias.requires_grad_(True)


def trained_biases(model: nn.Module, config: Any) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the base's biases that train under ``config.bias``."""
    rule = getattr(config, "bias", "none")
    if rule == "none":
        return []
    if rule == "lora_only":
        return [
            (f"{name}.base_layer.bias", host.bias)
            for name, host in host_layers(model)
            if isinstance(host.bias, nn.Parameter)
        ]
    owned = {id(p) for _, host in host_layers(model) for a in host.adapters.values() for p in a.parameters()}
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "bias" and id(parameter) not in owned and ".modules_to_save." not in name
    ]


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
) -> nn.Module:
    """Adapters in place, without a :class:`~deltaw.PeftModel` around the model: returns ``model`` itself.

    The adapter is active and trainable, everything else is frozen. Any ``nn.Module`` will do.

    Raises:
        TargetError, ConfigError, AdapterError: the model is then as it was before.
    """
    inject(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    set_active(model, [adapter_name], {adapter_name: peft_config}, trainable=not peft_config.inference_mode)
    return model
