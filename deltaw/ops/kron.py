"""One fused Kronecker linear: y = x W^T + b + s x (w1 ⊗ w2)^T, with its own backward, and without building w1 ⊗ w2.

A row of x, seen as a matrix X (m, n), meets the Kronecker product as w1 X w2^T (l, k): two or three small products,
taken in the cheaper order. Saved for backward is x itself (shared with whoever else saved it); the small products are
made again.

Takes tensors and a weight store; knows nothing of adapters or layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.ops.casting import autocast, bias_gradient, cast
from deltaw.ops.delta import remade
from deltaw.ops.onto import onto_store
from deltaw.ops.order import first_order
from deltaw.ops.recipe import kept, made_again
from deltaw.weights import WeightStore

__all__ = ["kron_linear", "kron_linear_reference", "kron_product"]

Second = Tensor | tuple[Tensor, Tensor]


def kron_linear(
    x: Tensor,
    store: WeightStore,
    bias: Tensor | None,
    w1: Tensor,
    w2: Second,
    scaling: float,
    *,
    row_scale: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + scaling x (w1 ⊗ w2)^T (LoKr: LyCORIS, arXiv 2309.14859, section 3.3).

    Args:
        x: (..., m n), any floating dtype; under autocast it is cast once, as a linear layer would.
        store: the base weight W (l k, m n); read again in backward, so a quantized weight is never kept dense.
        bias: (l k,) or None.
        w1: (l, m) and
        w2: (k, n), or its two factors ((k, r), (r, n)): masters, usually float32; cast to x's dtype for each use, their
            gradients come in their own dtype.
        scaling: s.
        row_scale: (l k,), what each output's update is multiplied by; None for 1.

    Returns:
        (..., l k) in x's dtype.

    Raises:
        RuntimeError: a second derivative is asked for (``create_graph=True``).
    """
    x = autocast(x)
    # for the reasons in lowrank_linear
    if torch.compiler.is_compiling() or store.requires_grad:
        return kron_linear_reference(x, store, bias, w1, w2, scaling, row_scale=row_scale)
    first, last = _split(w1, w2)
    recorded = torch.is_grad_enabled()
    return _KronLinear.apply(x, w1, first, last, bias, store, scaling, row_scale, recorded)  # type: ignore[no-any-return]


def kron_product(x: Tensor, w1: Tensor, w2: Second, scaling: float, *, row_scale: Tensor | None = None) -> Tensor:
    """scaling x (w1 ⊗ w2)^T, the update alone; for the arguments see :func:`kron_linear`."""
    x = autocast(x)
    if torch.compiler.is_compiling():
        return _formula(x, w1, w2, scaling, row_scale)
    first, last = _split(w1, w2)
    return _KronLinear.apply(x, w1, first, last, None, None, scaling, row_scale, True)  # type: ignore[no-any-return]


def kron_linear_reference(
    x: Tensor,
    store: WeightStore,
    bias: Tensor | None,
    w1: Tensor,
    w2: Second,
    scaling: float,
    *,
    row_scale: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch."""
    base = F.linear(x, store.dequantize().to(x.dtype), None if bias is None else bias.to(x.dtype))
    return base + _formula(x, w1, w2, scaling, row_scale)


def _formula(x: Tensor, w1: Tensor, w2: Second, scaling: float, row_scale: Tensor | None) -> Tensor:
    whole = w2 if isinstance(w2, Tensor) else w2[0] @ w2[1]
    X = x.unflatten(-1, (w1.shape[1], whole.shape[1]))  # (..., m, n)
    mixed = torch.einsum("lm,...mn->...ln", (w1 * scaling).to(x.dtype), X)
    update = F.linear(mixed, whole.to(x.dtype)).flatten(-2)  # (..., l k)
    return update if row_scale is None else update * row_scale.to(x.dtype)


# --- the order of the products ----------------------------------------------------------------------------------


def _split(w1: Tensor, w2: Second) -> tuple[Tensor | None, Tensor | None]:
    """(what meets x before w1 does, what comes after it): w2 on one side or its two factors on both, whichever takes
    the fewest multiply-adds."""
    l, m = w1.shape  # noqa: E741 (the letters of w1 (l, m), w2 (k, n))
    k, n = w2.shape if isinstance(w2, Tensor) else (w2[0].shape[0], w2[1].shape[1])
    before, after = m * n * k + l * m * k, l * m * n + l * n * k
    if isinstance(w2, tuple):
        r = len(w2[1])
        if m * n * r + l * m * r + l * r * k <= min(before, after):
            return w2[1], w2[0]
        w2 = remade(torch.matmul, *w2)
    return (w2, None) if before <= after else (None, w2)


def _right(t: Tensor, w: Tensor | None) -> Tensor:
    """Each row of ``t``, seen as (g, n), times w^T for w (p, n): (N, g n) -> (N, g p)."""
    if w is None:
        return t
    p, n = w.shape
    return (t.reshape(-1, n) @ w.t()).view(len(t), t.shape[1] // n * p)


def _mix(t: Tensor, w1: Tensor) -> Tensor:
    """w1 (l, m) times each row of ``t``, seen as (m, p): (N, m p) -> (N, l p)."""
    return torch.matmul(w1, _grouped(t, w1.shape[1])).flatten(1)


def _mix_gradient(grad: Tensor, t: Tensor, w1: Tensor) -> Tensor:
    """The gradient of w1 (l, m) in ``_mix(t, w1)``: grad (N, l p) times t (N, m p), summed over the rows and p."""
    left, right = (
        _grouped(u, groups).transpose(0, 1).flatten(1) for u, groups in zip((grad, t), w1.shape, strict=True)
    )
    return left @ right.t()  # (l, N p) @ (N p, m)


def _grouped(t: Tensor, groups: int) -> Tensor:
    """(N, groups p) -> (N, groups, p)."""
    return t.reshape(len(t), groups, t.shape[1] // groups)


# --- the operation ----------------------------------------------------------------------------------------------


class _KronLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        first: Tensor | None,
        last: Tensor | None,
        bias: Tensor | None,
        store: WeightStore | None,
        scaling: float,
        row_scale: Tensor | None,
        recorded: bool,
    ) -> Tensor:
        dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1])  # (N, m n)
        mixed = _mix(_right(rows, _cast(first, dtype)), cast(w1 * scaling, dtype))  # (N, l p)
        out = _right(mixed, _cast(last, dtype))  # (N, l k)
        if row_scale is not None:
            out = out * cast(row_scale, dtype)
        if store is not None:
            out = onto_store(out, rows, store, bias, recorded=recorded)
        ctx.recipe, inputs = kept(x)
        ctx.save_for_backward(w1, first, last, row_scale, *inputs)
        ctx.store, ctx.scaling, ctx.lead, ctx.dtype = store, scaling, x.shape[:-1], dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w1, first, last, row_scale, *inputs = ctx.saved_tensors
        need_x, need_w1, need_first, need_last, need_bias = ctx.needs_input_grad[:5]
        dtype = ctx.dtype
        grad = cast(grad.reshape(-1, grad.shape[-1]), dtype)  # (N, l k)
        rows = made_again(ctx.recipe, tuple(inputs))
        rows = rows.reshape(-1, rows.shape[-1])  # (N, m n)
        scaled, before, after = cast(w1 * ctx.scaling, dtype), _cast(first, dtype), _cast(last, dtype)
        dx = dw1 = dfirst = dlast = dbias = None
        met = _right(rows, before) if need_w1 or need_last else rows  # (N, m p)
        part = grad if row_scale is None else grad * cast(row_scale, dtype)
        if need_last and last is not None:
            mixed = _mix(met, scaled)  # (N, l p)
            dlast = cast(_columns(part, len(last)).t() @ _columns(mixed, last.shape[1]), last.dtype)
        part = _right(part, None if after is None else after.t())  # (N, l p)
        if need_w1:
            dw1 = cast(_mix_gradient(part, met, w1), w1.dtype) * ctx.scaling
        if need_x or need_first:
            part = _mix(part, scaled.t().contiguous())  # (N, m p)
        if need_first and first is not None:
            dfirst = cast(_columns(part, len(first)).t() @ _columns(rows, first.shape[1]), first.dtype)
        if need_x:
            dx = _right(part, None if before is None else before.t())  # (N, m n)
            if ctx.store is not None:
                with ctx.store.lent(dtype) as weight:
                    dx = dx.addmm_(grad, weight)  # in this order, for the reason in onto
            dx = dx.reshape(*ctx.lead, dx.shape[1])
        if need_bias:
            dbias = bias_gradient(grad, ctx.bias_dtype)
        return dx, dw1, dfirst, dlast, dbias, None, None, None, None


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else cast(tensor, dtype)


def _columns(t: Tensor, width: int) -> Tensor:
    return t.reshape(-1, width)
