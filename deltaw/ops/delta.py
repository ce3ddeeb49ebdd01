"""An update of a weight that is cheap to make: ΔW = make(its few parameters), made again in backward and never kept.

:func:`remade` gives ΔW as a tensor that keeps its parameters alone; :func:`delta_linear` applies it on top of a base
weight, folded into the base's one product where the precision allows it. Knows nothing of methods or layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.ops.casting import autocast, bias_gradient, cast, is_wide
from deltaw.ops.onto import added, onto_store
from deltaw.ops.order import first_order
from deltaw.ops.recipe import kept, made_again
from deltaw.weights import WeightStore

__all__ = ["delta_linear", "remade"]

Make = Callable[..., Tensor]


def remade(make: Make, *parameters: Tensor) -> Tensor:
    """make(*parameters), computed outside autocast; what ``make`` works out on the way is not kept for backward.

    Args:
        make: a function of ``parameters`` alone. It is called again in backward, so it must not draw random numbers.

    Raises:
        RuntimeError: a second derivative is asked for (``create_graph=True``).
    """
    if torch.compiler.is_compiling():  # the compiler decides by itself what to make again
        return make(*parameters)
    return _Remade.apply(make, *parameters)  # type: ignore[no-any-return]


def delta_linear(x: Tensor, store: WeightStore, bias: Tensor | None, make: Make, *parameters: Tensor) -> Tensor:
    """x (W + ΔW)^T + bias with ΔW = make(*parameters).

    In float32 and wider W + ΔW is one weight and its product one product. In half precision that sum would round small
    updates away, so the update has a product of its own, and the base is accumulated onto it.

    Args:
        x: (..., in), any floating dtype; under autocast it is cast once, as a linear layer would.
        store: the base weight W (out, in); read again in backward, so a quantized weight is never kept dense.
        bias: (out,) or None.
        make: parameters -> ΔW (out, in); called again in backward, so it must not draw random numbers.

    Returns:
        (..., out) in x's dtype.

    Raises:
        RuntimeError: a second derivative is asked for (``create_graph=True``).
    """
    x = autocast(x)
    if torch.compiler.is_compiling() or store.requires_grad:
        base = F.linear(x, cast(store.dequantize(), x.dtype), None if bias is None else cast(bias, x.dtype))
        return base + F.linear(x, cast(remade(make, *parameters), x.dtype))
    return _DeltaLinear.apply(x, bias, store, make, torch.is_grad_enabled(), *parameters)  # type: ignore[no-any-return]


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Make, *parameters: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(*parameters)
        return _make(make, parameters)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        delta, again = _again(ctx.make, ctx.saved_tensors, needed)
        return None, *_pull(delta, again, grad)


class _DeltaLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, store: WeightStore, make: Make, recorded: bool, *parameters: Tensor
    ) -> Tensor:
        dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        delta = cast(_make(make, parameters), dtype)
        base = store.few(rows) if is_wide(dtype) and not recorded else None
        if base is not None:
            out = added(base, rows @ delta.t(), bias, dtype)
        elif is_wide(dtype):
            with store.lent(dtype) as weight:
                out = F.linear(rows, weight + delta, None if bias is None else cast(bias, dtype))
        else:
            out = onto_store(rows @ delta.t(), rows, store, bias, recorded=recorded)
        ctx.recipe, inputs = kept(x)
        ctx.save_for_backward(*parameters, *inputs)
        ctx.store, ctx.make, ctx.lead, ctx.dtype = store, make, x.shape[:-1], dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_bias, _, _, _, *needed = ctx.needs_input_grad
        saved = ctx.saved_tensors
        parameters, inputs = saved[: len(needed)], saved[len(needed) :]
        grad = cast(grad.reshape(-1, grad.shape[-1]), ctx.dtype)  # (n, out)
        delta, again = _again(ctx.make, parameters, needed)
        dx = dbias = None
        if need_x:
            update = cast(delta.detach(), ctx.dtype)
            with ctx.store.lent(ctx.dtype) as weight:
                dx = grad @ (weight + update) if is_wide(ctx.dtype) else (grad @ update).addmm_(grad, weight)
            dx = dx.view(*ctx.lead, delta.shape[1])
        pulled: tuple[Tensor | None, ...] = (None,) * len(needed)
        if any(needed):
            rows = made_again(ctx.recipe, inputs).reshape(-1, delta.shape[1])
            pulled = _pull(delta, again, cast(grad.t() @ rows, delta.dtype))
        if need_bias:
            dbias = bias_gradient(grad, ctx.bias_dtype)
        return dx, dbias, None, None, None, *pulled


def _make(make: Make, parameters: tuple[Tensor, ...]) -> Tensor:
    with torch.autocast(parameters[0].device.type, enabled=False):
        return make(*parameters)


def _again(make: Make, parameters: tuple[Tensor, ...], needed: Any) -> tuple[Tensor, list[Tensor]]:
    """ΔW with a graph of its own, and the parameters that it hangs on."""
    with torch.enable_grad():
        again = [p.detach().requires_grad_(need) for p, need in zip(parameters, needed, strict=True)]
        return _make(make, tuple(again)), again


def _pull(delta: Tensor, again: list[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of ``again`` from that of ΔW."""
    found = iter(torch.autograd.grad(delta, [p for p in again if p.requires_grad], grad))
    return tuple(next(found) if p.requires_grad else None for p in again)
