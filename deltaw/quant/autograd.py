"""A product with a weight in four bits: x W^T + bias, for training and for the few rows of generation.

The weight is read for the product and forgotten; backward reads it again. Knows nothing of modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.quant.ops import dequantize_4bit, linear_4bit
from deltaw.quant.packed import READ_AS, Packed
from deltaw.scratch import borrowed

__all__ = ["FEW_ROWS", "few", "lent", "linear", "read"]

#: up to so many rows without a gradient are multiplied with the bytes themselves; more, with the weight written out.
#: Measured on a CPU, 576 x 576 to 2048 x 2048: of one row the bytes take half the time, at 8 the two are equal.
FEW_ROWS = 8


def read(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight as ``packed.dtype`` holds it, in ``dtype``."""
    if packed.dtype == dtype:
        return dequantize_4bit(packed)
    if packed.dtype == torch.float32 and dtype in READ_AS:  # rounded once either way
        return dequantize_4bit(replace(packed, dtype=dtype))
    return dequantize_4bit(packed).to(dtype)


def lent(packed: Packed, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
    """:func:`read` for the length of one product, after which the memory is someone else's. Where autograd might keep
    the weight, or a compiler plans the memory, it is a tensor of its own."""
    ours = packed.device.type == "cpu" and type(packed.codes) in (Tensor, nn.Parameter) and dtype in READ_AS
    if not ours or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext(read(packed, dtype))
    return _borrowed(packed, dtype)


@contextmanager
def _borrowed(packed: Packed, dtype: torch.dtype) -> Iterator[Tensor]:
    with borrowed(packed.shape, dtype) as weight:
        if packed.dtype == dtype or packed.dtype == torch.float32:  # rounded once either way
            dequantize_4bit(replace(packed, dtype=dtype), out=weight)
        else:
            with borrowed(packed.shape, packed.dtype) as held:
                weight.copy_(dequantize_4bit(packed, out=held))
        yield weight


def few(x: Tensor, packed: Packed) -> Tensor | None:
    """x (..., in) W^T in float32, (..., out), from the bytes themselves and without a gradient, where x has few rows;
    None where it has too many. Not rounded, so that what is added to it is not lost."""
    if not 0 < x.numel() <= FEW_ROWS * x.shape[-1] or x.dtype not in READ_AS:
        return None
    return linear_4bit(x.float(), packed)


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None) -> Tensor:
    """x (..., in) W^T + bias -> (..., out).

    Args:
        compute_dtype: x is cast to it and the result back, as bitsandbytes does; None: computed in x's dtype. Under
            autocast that one's dtype is the one.
    """
    given = x.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # meta knows no autocast
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif compute_dtype is not None:
        x = x.to(compute_dtype)
    base = None if torch.is_grad_enabled() else few(x, packed)
    if base is not None:
        out = (base if bias is None else base.add_(bias)).to(x.dtype)
    elif torch.compiler.is_compiling():  # the compiler decides by itself what to read again
        out = F.linear(x, read(packed, x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        bias = None if bias is None else bias.to(x.dtype)
        out = _Linear.apply(x, bias, packed, *packed.tensors().values())  # type: ignore[assignment]
    return out if compute_dtype is None else out.to(given)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)  # so that a change before backward is an error, as for any weight
        ctx.packed = packed
        with lent(packed, x.dtype) as weight:
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # every step is differentiable in grad, and the result does not depend on x: a second derivative is right too
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor a single time
        packed = replace(ctx.packed, **dict(zip(ctx.packed.tensors(), saved, strict=True)))
        grad_x = None
        if ctx.needs_input_grad[0]:
            with lent(packed, grad.dtype) as weight:
                grad_x = grad @ weight
        grad_bias = None
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])
            grad_bias = rows.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
        return grad_x, grad_bias, None, *[None] * len(saved)
