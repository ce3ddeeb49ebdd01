"""Puts adapters into a model: layers become hosts, everything else is frozen. A failure leaves the model as
it was."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer, host_layers
from deltaw.adapters.hosts import host_type
from deltaw.adapters.registry import adapters_of, tied_adapters_of
from deltaw.adapters.saved import ModulesToSaveWrapper
from deltaw.adapters.targets import Targets, resolve
from deltaw.adapters.tokentargets import place_tokens, token_targets
from deltaw.errors import AdapterError, ModelError
from deltaw.fullweights import weights_at_hand
from deltaw.modules import set_submodule
from deltaw.quant.adopt import adopting

__all__ = [
    "carriers",
    "check_active",
    "check_name",
    "inject",
    "inject_adapter_in_model",
    "remove_adapter",
    "set_active",
    "trained_biases",
]

log = logging.getLogger("deltaw")

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
#: nn.ModuleDict refuses keys that are attributes of its own
RESERVED_NAMES = frozenset(dir(nn.ModuleDict()))


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
    """Adds adapter ``name`` to the layers that ``config`` means and freezes the base. The adapter is not
    active yet.

    Layers in 4 bits that bitsandbytes made become ours, over the same memory.

    Args:
        low_cpu_mem_usage: make the adapter's tensors on the meta device, to be filled from a file.

    Raises:
        TargetError, ConfigError, AdapterError, ModelError: the model is then as it was before.
    """
    check_name(name)
    with adopting(model):
        return _inject(model, config, name, strict=strict, low_cpu_mem_usage=low_cpu_mem_usage)


def _inject(model: nn.Module, config: PeftConfig, name: str, *, strict: bool, low_cpu_mem_usage: bool) -> Targets:
    if any(name in host.adapters for _, host in host_layers(model)):
        raise AdapterError(f"adapter {name!r} already exists on {type(model).__name__}; delete it or use another name")
    targets = resolve(model, config, strict=strict)
    taken = {**dict.fromkeys(targets.adapted, "target_modules"), **dict.fromkeys(targets.saved, "modules_to_save")}
    tokens = token_targets(model, config, taken)
    read = {**targets.adapted, **{path: model.get_submodule(path) for path in tokens.leading}}
    offloaded = [n for n, m in read.items() if getattr(getattr(m, "_hf_hook", None), "offload", False)]
    if offloaded:
        # the hook brings such a weight in for its layer's own forward only; an adapter would read nothing
        raise ModelError(
            f"cannot put an adapter on {offloaded[0]!r}{f' and {len(offloaded) - 1} more' if offloaded[1:] else ''}: "
            "the layer is offloaded to CPU or disk (device_map); load the model where it fits, or in fewer bits"
        )
    adapters, tied = adapters_of(config), tied_adapters_of(config)
    try:
        with weights_at_hand(model):
            for layer_name, module in targets.adapted.items():
                host = module
                if not isinstance(module, HostLayer):
                    made = host_type(module)
                    assert made is not None  # resolve() has refused what has no host
                    host = made(module)
                    host.train(module.training)
                    set_submodule(model, layer_name, host)
                assert isinstance(host, HostLayer)
                with torch.device("meta") if low_cpu_mem_usage else nullcontext():
                    if layer_name in targets.tied:
                        host.slot("tied_to", dict)[name] = model.get_submodule(targets.tied[layer_name])
                    host.add((tied if layer_name in targets.tied else adapters)[host.kind], name, config, layer_name)
        for saved_name, module in targets.saved.items():
            wrapper = module
            if not isinstance(module, ModulesToSaveWrapper):
                wrapper = ModulesToSaveWrapper(module)
                set_submodule(model, saved_name, wrapper)
            assert isinstance(wrapper, ModulesToSaveWrapper)
            wrapper.add(name)
            if saved_name in targets.tied:
                source = model.get_submodule(targets.tied[saved_name])
                assert isinstance(source, ModulesToSaveWrapper)
                wrapper.share(name, source)
        with torch.device("meta") if low_cpu_mem_usage else nullcontext():
            place_tokens(model, tokens, name, config)
    except BaseException:
        remove_adapter(model, name)
        raise
    held = {p for _, carrier in carriers(model) for p in _own_parameters(carrier)}
    for parameter in model.parameters():
        if parameter not in held:
            parameter.requires_grad_(False)
    return targets


def check_name(name: str) -> str:
    """``name`` if an adapter may be called so.

    Raises:
        AdapterError: it would not be safe as a folder or as a module's name.
    """
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name!r}: use letters, digits, '_' and '-', a letter or digit first, at most 64"
        )
    if name in RESERVED_NAMES:
        raise AdapterError(f"adapter name {name!r} is reserved by torch; choose another, e.g. {name + '_1'!r}")
    return name


def _own_parameters(carrier: HostLayer | ModulesToSaveWrapper) -> Iterator[nn.Parameter]:
    """The parameters that belong to adapters, not to the base."""
    if isinstance(carrier, HostLayer):
        for adapter in carrier.adapters.values():
            yield from adapter.parameters()
    else:
        yield from carrier.modules_to_save.parameters()


def remove_adapter(model: nn.Module, name: str) -> None:
    """Takes adapter ``name`` off every layer; a layer left without adapters becomes the plain base layer
    again."""
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


def check_active(model: nn.Module, names: Sequence[str]) -> None:
    """
    Raises:
        AdapterError: adapters ``names`` cannot be active together.
    """
    for _, carrier in carriers(model):
        carrier.check_active(names)


def set_active(model: nn.Module, names: Sequence[str], configs: dict[str, Any], *, trainable: bool = True) -> None:
    """Activates adapters ``names`` and freezes the others; base biases train with the adapter whose config
    names them.

    Raises:
        AdapterError: some of ``names`` cannot be active together; nothing was changed.
    """
    check_active(model, names)
    for _, carrier in carriers(model):
        carrier.set_active(names, trainable)
    for name, config in configs.items():
        for _, bias in trained_biases(model, config):
            bias.requires_grad_(trainable and name in names)


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
    held = {p for _, carrier in carriers(model) for p in _own_parameters(carrier)}
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "bias" and parameter not in held
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
