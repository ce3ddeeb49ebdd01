"""Fused experts in four bits: a module that holds the weights of all its experts as 3-D parameters keeps their bytes
instead, and its own forward reads them as before.

The module stays of its class, with one property for each such weight (a :class:`~deltaw.quant.lazy.LazyWeight`) in
the parameter's place; a state dict has bitsandbytes' keys (``gate_up_proj``, ``gate_up_proj.absmax``, ...). Knows
nothing of any model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import CheckpointError
from deltaw.quant.bnb_format import KEYS, fitting, stored, to_bnb
from deltaw.quant.lazy import LazyWeight
from deltaw.quant.ops import dequantize_4bit
from deltaw.quant.packed import READ_AS, Packed, uncast

__all__ = ["PackedExperts", "expert_weights", "keep_dense_", "keep_packed_"]

#: attribute of Packed -> what is appended to the weight's name for the parameter that holds it
_HELD = {"codes": "", "absmax": "_absmax", "nested_absmax": "_nested_absmax", "nested_offset": "_nested_offset"}
_NO_TENSORS = dict.fromkeys(("nested_absmax", "nested_offset"))


def expert_weights(module: nn.Module) -> list[str]:
    """Names of the parameters of ``module`` that are the weights of many experts: (experts, out, in) or, in some
    models, (experts, in, out). Biases and routers are none."""
    if "expert" not in type(module).__name__.lower():  # transformers' word for them, without exception
        return []
    own = module._parameters.items()
    return [name for name, p in own if p is not None and p.dim() == 3 and p.dtype in READ_AS]


def keep_packed_(module: nn.Module, name: str, packed: Packed, storage: torch.dtype = torch.uint8) -> None:
    """Puts ``packed`` in the place of the parameter ``name`` of ``module``, which becomes a :class:`PackedExperts`.

    Args:
        storage: the dtype under which the bytes are kept.
    """
    if not isinstance(module, PackedExperts):
        module.__dict__["packed_as"] = {}
        module.__class__ = _packed_class(type(module))
    assert isinstance(module, PackedExperts)
    module.packed_as[name] = replace(packed, codes=None, absmax=None, **_NO_TENSORS)  # type: ignore[arg-type]
    for attribute, tensor in packed.tensors().items():
        tensor = stored(tensor, storage) if attribute == "codes" else tensor
        module._parameters[name + _HELD[attribute]] = nn.Parameter(tensor.detach(), requires_grad=False)
    _show(type(module), name)


def keep_dense_(module: PackedExperts, dtype: torch.dtype | None = None) -> None:
    """Undoes :func:`keep_packed_` for all weights of ``module``: plain parameters again, of what they were read as."""
    for name in list(module.packed_as):
        weight = dequantize_4bit(module.packed(name))
        for suffix in _HELD.values():
            module._parameters.pop(name + suffix, None)
        module._parameters[name] = nn.Parameter(weight if dtype is None else weight.to(dtype), requires_grad=False)
    del module.__dict__["packed_as"]
    module.__class__ = type(module).__mro__[2]


class PackedExperts(nn.Module):
    """A module some of whose 3-D weights are kept in four bits.

    Attributes:
        packed_as: name of a weight -> how its bytes are to be read (a ``Packed`` without tensors).
    """

    packed_as: dict[str, Packed]

    def packed(self, name: str) -> Packed:
        """A weight as it is kept; shares the parameters' memory."""
        tensors = {attribute: self._parameters.get(name + suffix) for attribute, suffix in _HELD.items()}
        codes = tensors["codes"]
        assert codes is not None
        tensors["codes"] = codes.detach().view(torch.uint8).view(-1)  # type: ignore[assignment]
        return replace(self.packed_as[name], **tensors)  # type: ignore[arg-type]

    def logical_sizes(self) -> dict[str, int]:
        """Name of a parameter -> how many weights of the model it stands for, where that is not its own size."""
        sizes = {name + suffix: 0 for name in self.packed_as for suffix in _HELD.values()}
        return {k: v for k, v in sizes.items() if k in self._parameters} | {
            name: how.shape.numel() for name, how in self.packed_as.items()
        }

    def extra_repr(self) -> str:
        each = [f"{name}: {tuple(how.shape)} in {how.quant_type}" for name, how in self.packed_as.items()]
        return ", ".join(filter(None, [super().extra_repr(), *each]))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # its class is made at run time, and cannot be found by name
        return _blank, (type(self).__mro__[2], tuple(self.packed_as)), self.__getstate__()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedExperts:
        """Moves; of packed weights and their statistics it changes the device alone, never the dtype."""
        held = [self._parameters[name] for name in self.logical_sizes()]
        return super()._apply(uncast(fn, held), recurse)  # type: ignore[return-value, arg-type]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        held = {prefix + name for name in self.logical_sizes()}
        destination.update({key: tensor for key, tensor in own.items() if key not in held})
        for name in self.packed_as:
            storage = self._parameters[name].dtype  # type: ignore[union-attr]
            for key, tensor in to_bnb(self.packed(name), storage).items():
                destination[prefix + _named(key, name)] = tensor
            if keep_vars:
                destination[prefix + name] = self._parameters[name]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        missing, _, errors = rest[-3:]
        taken: set[str] = set()
        own: dict[str, Any] = {}
        for name in self.packed_as:
            keys = {key: prefix + _named(key, name) for key in KEYS}
            given = {key: state_dict[full] for key, full in keys.items() if full in state_dict}
            taken.update(keys.values())
            packed = self.packed(name)  # what is not given, or wrong, stays
            if not given:
                missing.append(prefix + name)
            else:
                try:
                    packed = fitting(given, packed, "module")
                except CheckpointError as error:
                    errors.append(f"{prefix}{name}: {error}")
            storage = self._parameters[name].dtype  # type: ignore[union-attr]
            for attribute, tensor in packed.tensors().items():
                own[prefix + name + _HELD[attribute]] = stored(tensor, storage) if attribute == "codes" else tensor
            self.packed_as[name] = replace(self.packed_as[name], dtype=packed.dtype)
        own |= {k: v for k, v in state_dict.items() if k.startswith(prefix) and k not in taken}
        super()._load_from_state_dict(own, prefix, *rest)


def _named(key: str, name: str) -> str:
    """``weight.absmax`` -> ``gate_up_proj.absmax``."""
    return name + key.removeprefix("weight")


@functools.cache
def _packed_class(kind: type[nn.Module]) -> type[PackedExperts]:
    """``kind`` that keeps bytes; of the same name, since that is what a model tells its modules apart by."""
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (PackedExperts, kind), body)


def _show(kind: type, name: str) -> None:
    """Gives a packed class the property that stands where the parameter was: a class's attribute is found before a
    parameter, so reading gives the weight and ``named_parameters`` its bytes."""

    def read(module: PackedExperts) -> Tensor | None:
        if name not in module.packed_as:
            return module._parameters[name]
        packed = module.packed(name)
        # a compiler plans itself what is kept for backward
        return dequantize_4bit(packed) if torch.compiler.is_compiling() else LazyWeight(packed)

    if name not in vars(kind):
        setattr(kind, name, property(read))


def _blank(kind: type[nn.Module], names: tuple[str, ...]) -> Any:
    packed = _packed_class(kind)
    for name in names:
        _show(packed, name)
    return packed.__new__(packed)
