"""``prepare_model_for_kbit_training``: a base is frozen and made ready to train adapters with little memory.

PEFT's function of this name turns every weight in half precision into float32, which for a large vocabulary costs more
than four bits have saved. Here nothing is cast unless it is asked for. Knows nothing of how weights are packed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapters.running import CHECKPOINTING, let_gradients_in
from deltaw.errors import ModelError
from deltaw.modules import dtype_of

__all__ = ["memory_of", "prepare_model_for_kbit_training"]

log = logging.getLogger("deltaw")


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast_norms: bool = False,
    upcast_head: bool = False,
) -> Any:
    """Freezes a base, in 4 bits or not, and lets it recompute activations in backward; returns the same model.

    The memory that its weights take, before and after, is logged.

    Args:
        model: before adapters are put on it.
        use_gradient_checkpointing: recompute activations in backward: less memory, about a third more time.
        gradient_checkpointing_kwargs: of ``torch.utils.checkpoint``; ``use_reentrant`` is False unless given.
        auto_clear_cache: give memory that casting has freed back to the GPU.
        upcast_norms: keep the norms in float32; what they return stays in the model's dtype.
        upcast_head: compute the logits in float32. A head that is tied to the embedding takes it along.

    Raises:
        ModelError: a head is to be cast and there is none, or activations cannot be recomputed.
    """
    before = memory_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dtype = dtype_of(model) or torch.float32
    if upcast_norms:
        for module in _norms(model):
            _compute_in_float32(module, dtype)
    if upcast_head:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            raise ModelError(f"upcast_head=True: {type(model).__name__} has no output head; leave it out")
        _compute_in_float32(head, None)
        embedding = model.get_input_embeddings()
        if embedding.weight is head.weight:
            _compute_in_float32(embedding, dtype)
    if auto_clear_cache and (upcast_norms or upcast_head) and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if use_gradient_checkpointing:
        _checkpoint(model, gradient_checkpointing_kwargs or {"use_reentrant": False})
    after = memory_of(model)
    log.info("weights take %.1f MiB, and took %.1f before the model was prepared", after / 2**20, before / 2**20)
    return model


def memory_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what is shared counts once."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def _norms(model: nn.Module) -> list[nn.Module]:
    """Modules that are called norms and hold nothing but vectors."""
    found = [(module, list(module.parameters())) for module in model.modules()]
    named = [(m, own) for m, own in found if "norm" in type(m).__name__.lower() and own]
    return [module for module, own in named if all(parameter.dim() == 1 for parameter in own)]


def _compute_in_float32(module: nn.Module, returns: torch.dtype | None) -> None:
    """Casts the weights of ``module`` and, at each call, what it gets and (where ``returns`` says so) gives."""
    for parameter in module.parameters(recurse=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    module.register_forward_pre_hook(_widen)
    if returns is not None:
        module.register_forward_hook(partial(_narrow, returns))


def _widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_cast(value, torch.float32) for value in args)


def _narrow(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    return _cast(out, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _checkpoint(model: Any, kwargs: dict[str, Any]) -> None:
    enable: Callable[..., None] | None = next((getattr(model, n) for n in CHECKPOINTING if hasattr(model, n)), None)
    if enable is None:
        raise ModelError(
            f"use_gradient_checkpointing=True: {type(model).__name__} cannot recompute its activations (it is no model "
            "of transformers); pass use_gradient_checkpointing=False"
        )
    try:
        enable(kwargs)
    except ValueError as error:
        raise ModelError(f"use_gradient_checkpointing=True: {error}; pass use_gradient_checkpointing=False") from error
    let_gradients_in(model)
