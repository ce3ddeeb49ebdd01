"""One fused low-rank linear: y = x W^T + b + s (drop(x) A^T) B^T, with its own backward.

What plain autograd would keep and this does not: the base's and the adapter's separate outputs, a float32 copy of x,
a dropped copy of x, a dense weight made from a quantized one. Saved for backward are x itself (shared with whoever
else saved it), x A^T (one column a rank), and with dropout one byte an input element.

Takes tensors and a weight store; knows nothing of adapters or layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.ops.casting import autocast, bias_gradient, cast
from deltaw.ops.onto import onto_store
from deltaw.ops.order import first_order
from deltaw.ops.recipe import kept, made_again
from deltaw.weights import WeightStore

__all__ = ["lowrank_linear", "lowrank_linear_reference"]


def lowrank_linear(
    x: Tensor,
    store: WeightStore,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """x W^T + bias + scaling (drop(x) A^T) B^T (LoRA, arXiv 2106.09685, equation 3).

    Args:
        x: (..., in), any floating dtype; under autocast it is cast once, as a linear layer would.
        store: the base weight W (out, in); read again in backward, so a quantized weight is never kept dense.
        bias: (out,) or None.
        A: (r, in) and
        B: (out, r): masters, usually float32; cast to x's dtype for each use, their gradients come in their own dtype.
        scaling: s.
        dropout: probability with which an element of the adapter's input is dropped; 0 outside training.

    Returns:
        (..., out) in x's dtype.

    Raises:
        RuntimeError: a second derivative is asked for (``create_graph=True``).
    """
    x = autocast(x)
    # The compiler fuses the plain formula by itself and cannot look into a hand-written backward; a base weight that
    # trains needs its own gradient, which only the plain formula has.
    if torch.compiler.is_compiling() or store.requires_grad:
        return lowrank_linear_reference(x, store, bias, A, B, scaling, dropout=dropout)
    keep = keep_mask(x, dropout) if dropout else None
    return _LowRankLinear.apply(x, A, B, bias, store, scaling, keep, dropout, torch.is_grad_enabled())  # type: ignore[no-any-return]


def lowrank_linear_reference(
    x: Tensor,
    store: WeightStore,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, as the paper writes it; ``keep`` fixes the dropout mask (True: kept)."""
    dtype = x.dtype
    base = F.linear(x, store.dequantize().to(dtype), None if bias is None else bias.to(dtype))
    dropped = F.dropout(x, dropout) if keep is None else x * keep / (1 - dropout)
    low = F.linear(dropped, A.to(dtype))  # (..., r)
    return base + F.linear(low, (B * scaling).to(dtype))


def keep_mask(x: Tensor, p: float) -> Tensor:
    """Boolean mask shaped like x, True with probability 1 - p (p is taken to the nearest 1/65536).

    One 64-bit draw decides four elements, so that dropout costs a CPU little.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    threshold = round(p * 65536) - 32768  # an int16 is uniform on [-32768, 32767]
    return (words.view(torch.int16)[: x.numel()] >= threshold).view(x.shape)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        store: WeightStore,
        scaling: float,
        keep: Tensor | None,
        p: float,
        recorded: bool,
    ) -> Tensor:
        dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        fed = rows if keep is None else _drop(rows, keep, p)
        low = fed @ cast(A, dtype).t()  # (n, r)
        update = low @ cast(B * scaling, dtype).t()  # (n, out)
        out = onto_store(update, rows, store, bias, recorded=recorded)
        ctx.recipe, inputs = kept(x)
        ctx.save_for_backward(A, B, low, keep, *inputs)
        ctx.store, ctx.scaling, ctx.p, ctx.lead = store, scaling, p, x.shape[:-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, B, low, keep, *inputs = ctx.saved_tensors
        need_x, need_A, need_B, need_bias = ctx.needs_input_grad[:4]
        dtype = low.dtype
        grad = cast(grad.reshape(-1, grad.shape[-1]), dtype)  # (n, out)
        dx = dA = dB = dbias = None
        if need_x or need_A:
            down = grad @ cast(B * ctx.scaling, dtype)  # (n, r)
            if need_A:
                rows = made_again(ctx.recipe, tuple(inputs)).reshape(-1, A.shape[1])
                fed = rows if keep is None else _drop(rows, keep, ctx.p)
                dA = cast(down.t() @ fed, A.dtype)
            if need_x:
                dx = down @ cast(A, dtype)  # (n, in)
                if keep is not None:
                    dx = _drop(dx, keep, ctx.p)
                with ctx.store.lent(dtype) as weight:
                    dx.addmm_(grad, weight)  # in this order, for the reason in onto
                dx = dx.view(*ctx.lead, A.shape[1])
        if need_B:
            dB = cast(grad.t() @ low, B.dtype).mul_(ctx.scaling)
        if need_bias:
            dbias = bias_gradient(grad, ctx.bias_dtype)
        return dx, dA, dB, dbias, None, None, None, None, None


def _drop(rows: Tensor, keep: Tensor, p: float) -> Tensor:
    return (rows * keep.view(rows.shape)).mul_(1 / (1 - p))
