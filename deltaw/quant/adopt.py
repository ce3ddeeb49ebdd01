"""Layers that bitsandbytes made become ours over the same bytes: what transformers loaded with a ``BitsAndBytesConfig``
is taken as it is.

They are replaced, not wrapped: bitsandbytes' own forward repacks its weights for its CPU kernel in evaluation, after
which a gradient is lost and the block scales are rounded. Knows bitsandbytes' attributes and does not import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from deltaw.errors import CheckpointError, ModelError
from deltaw.modules import set_submodule
from deltaw.quant.bnb_format import from_bnb
from deltaw.quant.linear import NF4Linear
from deltaw.weights import is_a

__all__ = ["adopt_", "adopting"]

LINEAR_4BIT = "bitsandbytes.nn.modules.Linear4bit"


@contextmanager
def adopting(model: nn.Module) -> Iterator[None]:
    """:func:`adopt_`, undone when the block fails."""
    replaced = adopt_(model)
    try:
        yield
    except BaseException:
        for name, theirs in replaced.items():
            _swap(model, name, theirs)
        raise


def adopt_(model: nn.Module) -> dict[str, nn.Module]:
    """Replaces bitsandbytes' 4-bit linear layers by :class:`~deltaw.quant.linear.NF4Linear` that share their memory, so
    that what is read stays the same to the bit.

    Returns:
        name -> the layer that was there.

    Raises:
        ModelError: layers whose weights are not quantized yet, or were repacked by a forward in evaluation on a CPU;
            nothing was changed.
    """
    theirs = {name: module for name, module in model.named_modules() if is_a(module, LINEAR_4BIT)}
    ours: dict[str, NF4Linear] = {}
    faults: dict[str, list[str]] = {}
    for name, module in theirs.items():
        try:
            ours[name] = _adopted(module)
        except (CheckpointError, ModelError) as error:
            faults.setdefault(str(error), []).append(name)
    if faults:
        told = [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {why}" for why, names in faults.items()]
        raise ModelError(f"4-bit layers of bitsandbytes cannot be taken over: {'; '.join(told[:3])}")
    for name, module in ours.items():
        _swap(model, name, module)
    return theirs


def _adopted(module: Any) -> NF4Linear:
    state = getattr(module.weight, "quant_state", None) or module.quant_state  # FSDP strips the parameter of its own
    if state is None:
        raise ModelError("its weight is in full until it is moved to its device: model.to(...) first")
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "a forward in evaluation has repacked its weight for bitsandbytes' CPU kernel, which rounds the block "
            "scales; load the model again and add adapters before that, or load it with deltaw.NF4Config, where "
            "evaluation changes nothing"
        )
    tensors = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    packed = from_bnb({"weight": module.weight.data, **tensors})
    made = NF4Linear.from_packed(
        packed,
        module.bias,
        compute_dtype=module.compute_dtype,
        quant_storage=module.weight.dtype,
    )
    return made.train(module.training)


def _swap(model: nn.Module, name: str, new: nn.Module) -> None:
    old = model.get_submodule(name)
    hook: Any = getattr(old, "_hf_hook", None)  # accelerate's: it moves inputs to the layer's device
    if hook is None:
        set_submodule(model, name, new)
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module  # slow to import, and it needs yaml

    remove_hook_from_module(old)
    set_submodule(model, name, new)
    add_hook_to_module(new, hook)
