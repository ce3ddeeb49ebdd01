"""``quantize_``: the linear layers of a model into four bits, in place, one after the other.

Knows nothing of files or of adapters, except that what stands beside a ``base_layer`` is no part of the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from deltaw.errors import ModelError
from deltaw.modules import set_submodule, split_name, weight_owners
from deltaw.quant.config import NF4Config
from deltaw.quant.experts import expert_weights, keep_packed_
from deltaw.quant.linear import NF4Linear, pack, weight_fault
from deltaw.weights import is_a, only_multiplies, store_of

__all__ = ["QuantizationReport", "quantizable", "quantize_", "skipped_names"]

CONV1D = "transformers.pytorch_utils.Conv1D"  # GPT-2's linear layer: its weight is stored (in, out)


@dataclass
class QuantizationReport:
    """What :func:`quantize_` did.

    Attributes:
        layers: names of the layers that are in four bits now.
        elements: weights in them.
        bytes_before, bytes_after: what those took and take, statistics included.
        left: name of a linear layer that stayed as it was -> why.
    """

    layers: list[str] = field(default_factory=list)
    elements: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    left: dict[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits a weight of the quantized layers."""
        return 8 * self.bytes_after / self.elements if self.elements else 0.0

    def add(self, name: str, elements: int, bytes_before: int, bytes_after: int) -> None:
        self.layers.append(name)
        self.elements += elements
        self.bytes_before += bytes_before
        self.bytes_after += bytes_after

    def __str__(self) -> str:
        before, after = (f"{size / 2**20:,.1f} MiB" for size in (self.bytes_before, self.bytes_after))
        done = (
            f"{len(self.layers)} layers of {self.elements:,} weights quantized: {before} became {after}, "
            f"{self.bits:.3f} bits a weight"
        )
        whys: dict[str, list[str]] = {}
        for name, why in self.left.items():
            whys.setdefault(why, []).append(name)
        left = [
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} ({why})"
            for why, names in whys.items()
        ]
        return f"{done}; left as they are: {', '.join(left)}" if left else done


def quantizable(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that only multiplies by its weight: ``nn.Linear`` or ``Conv1D``."""
    if isinstance(module, (NF4Linear, NonDynamicallyQuantizableLinear)):  # attention reads the latter's weight itself
        return False
    return (isinstance(module, nn.Linear) or is_a(module, CONV1D)) and only_multiplies(module)


def skipped_names(model: nn.Module, config: NF4Config, skip: Iterable[str] | None = None) -> list[str]:
    """Patterns of the modules that :func:`quantize_` leaves: those that transformers leaves for bitsandbytes (the
    output head and what is tied to the embedding, or, given, ``llm_int8_skip_modules``; what the model keeps in
    float32), and ``skip``."""
    names = set(skip or ())
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    names.update(getattr(inner, "_keep_in_fp32_modules", None) or ())
    if config.llm_int8_skip_modules is not None:
        names.update(config.llm_int8_skip_modules)
    elif inner is not None:
        names.update(_plain(name) for name in get_keys_to_not_convert(inner))
        names.add("lm_head")
    return sorted(names)


@torch.no_grad()
def quantize_(
    model: nn.Module, config: NF4Config | None = None, skip: Sequence[str] | None = None
) -> QuantizationReport:
    """Replaces the linear layers of ``model`` by :class:`~deltaw.quant.linear.NF4Linear`, those under adapters too, and
    packs fused experts. In place; at its peak it needs one layer's memory more than before.

    Args:
        config: how; default: NF4, not double quantized.
        skip: modules to leave, beside those that are left anyhow (see :func:`skipped_names`).

    Raises:
        ModelError: weights that are not finite or cannot be quantized, or adapters that are merged into them; nothing
            was changed.
    """
    from deltaw.quant.hfquantizer import mark_quantized  # it knows this file

    config = config or NF4Config()
    report = QuantizationReport()
    patterns = skipped_names(model, config, skip)
    places = _places(model, patterns, report)
    experts = _experts(model, patterns, report)
    faults = [f"{name} {fault}" for name in places if (fault := _fault(model, name, config))]
    faults += [f"{name} {fault}" for name in experts if (fault := weight_fault(_parameter(model, name), config))]
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise ModelError(f"this model cannot be quantized, and was left as it was: {shown}")
    twins = _twins(model, places)
    for name in places:
        module = model.get_submodule(name)
        if name in twins:
            first = model.get_submodule(twins[name])
            assert isinstance(first, NF4Linear)
            new = first.twin(module._parameters.get("bias"))
        else:
            new = NF4Linear.from_linear(module, config)
            report.add(name, new.packed.numel(), module.weight.nbytes, new.packed.nbytes())  # type: ignore[union-attr]
        for path in [path for path, other in model.named_modules(remove_duplicate=False) if other is module]:
            set_submodule(model, path, new)
        del module  # and with it the weight, before the next one is quantized
    for name in experts:
        weight = _parameter(model, name)
        packed = pack(weight, config)
        report.add(name, packed.numel(), weight.nbytes, packed.nbytes())
        keep_packed_(
            model.get_submodule(split_name(name)[0]), split_name(name)[1], packed, config.bnb_4bit_quant_storage
        )
        del weight
    if report.layers:
        mark_quantized(model, config, skip=[_plain(name) for name in report.left] + list(skip or ()))
    return report


def _experts(model: nn.Module, patterns: list[str], report: QuantizationReport) -> list[str]:
    """Full names of the weights of fused experts to quantize; why others are left goes into ``report``."""
    root = _root(model)
    names: list[str] = []
    for name, module in model.named_modules():
        weights = [f"{name}.{weight}" for weight in expert_weights(module)]
        if should_convert_module(_plain(name.removeprefix(root)), patterns):
            names += weights
        else:
            report.left |= dict.fromkeys(weights, "skipped by name")
    return names


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    path, own = split_name(name)
    parameter = model.get_submodule(path)._parameters[own]
    assert parameter is not None
    return parameter


def _places(model: nn.Module, patterns: list[str], report: QuantizationReport) -> list[str]:
    """Names of the layers to quantize; why others are left goes into ``report``."""
    root = _root(model)
    beside = tuple(f"{name}." for name in _beside_bases(model))
    places: list[str] = []
    for name, module in model.named_modules():
        if not quantizable(module) or f"{name}.".startswith(beside):
            continue
        if not should_convert_module(_plain(name.removeprefix(root)), patterns):
            report.left[name] = "skipped by name"
        elif module._parameters.get("weight") is None:
            report.left[name] = "its weight is computed anew at each forward"
        else:
            places.append(name)
    owners = weight_owners(model)
    for name in list(places):
        weight: nn.Parameter = model.get_submodule(name).weight  # type: ignore[assignment]
        others = [owner for owner in owners[weight] if owner.removesuffix(".weight") not in places]
        if others:
            report.left[name] = f"tied to {', '.join(others)}"
    return [name for name in places if name not in report.left]


def _twins(model: nn.Module, places: list[str]) -> dict[str, str]:
    """Layer -> the earlier one of ``places`` that shares its weight."""
    first: dict[int, str] = {}
    named = [(name, first.setdefault(id(model.get_submodule(name).weight), name)) for name in places]
    return {name: earlier for name, earlier in named if earlier != name}


def _fault(model: nn.Module, name: str, config: NF4Config) -> str:
    """Why the layer cannot be quantized, in words; empty when it can."""
    weight = store_of(model.get_submodule(name)).dequantize()
    host = model.get_submodule(split_name(name)[0])
    if getattr(host, "merged_adapters", None):
        return f"holds merged adapters ({', '.join(host.merged_adapters)}): unmerge them first"  # type: ignore[arg-type]
    return weight_fault(weight, config)


def _root(model: nn.Module) -> str:
    """What the names of a transformers model's layers begin with, in what is wrapped around it; with its dot."""
    name = next((name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)), "")
    return f"{name}." if name else ""


def _beside_bases(model: nn.Module) -> list[str]:
    """Modules that came with adapters: what stands beside a ``base_layer``, or beside the original of a module that is
    trained whole."""
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        for base in ("base_layer", "original_module")
        if base in module._modules
        for child in module._modules
        if child != base
    ]


def _plain(name: str) -> str:
    """The name of a layer as it is without adapters."""
    return name.replace(".base_layer", "").replace(".original_module", "")
