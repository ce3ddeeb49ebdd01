"""DoRA's magnitude step, y = bias + (m / norm) (out - bias), and the row norms of W + s B A without that matrix.

Saved for backward are y, which what follows mostly keeps anyway, and two numbers an output; plain autograd keeps two
tensors as large as y, and PEFT builds W + s B A in each forward. Takes tensors; knows nothing of adapters or layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltaw.ops.order import first_order
from deltaw.weights import wide

__all__ = ["gain", "rescale", "rescale_reference", "row_norms", "row_squares"]

#: rows of half precision that a CPU sums up before it goes on in float32
GROUP = 64


def rescale(out: Tensor, bias: Tensor | None, magnitude: Tensor, norm: Tensor) -> Tensor:
    """bias + (m / norm) (out - bias), elementwise (DoRA, arXiv 2402.09353, equation 5).

    Bitwise ``out`` where m equals the norm. Rounded once: what is added to ``out`` is (m / norm - 1) (out - bias), so a
    magnitude that has moved less than a unit in its last place still counts.

    Args:
        out: x (W + s B A)^T + bias, any floating dtype.
        bias: what is in ``out`` and is not scaled; or None.
        magnitude: m, with one dimension for each of out's last ones: (d,) for (..., d), (1, d, 1, 1) for images.
        norm: of the rows of W + s B A, shaped like m; a constant to autograd (section 4.3 of the paper).

    Returns:
        Like ``out``. A magnitude of exactly zero gets no gradient.

    Raises:
        RuntimeError: in backward, if the result was changed in place meanwhile, or for a second derivative.
    """
    if torch.compiler.is_compiling():
        return rescale_reference(out, bias, magnitude, norm)
    return _Rescale.apply(out, bias, magnitude, norm)  # type: ignore[no-any-return]


def rescale_reference(out: Tensor, bias: Tensor | None, magnitude: Tensor, norm: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    plain = out if bias is None else out - _beside(bias, magnitude).to(out.dtype)
    return (out + (gain(magnitude, norm) - 1) * plain).to(out.dtype)


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / norm in float32 or wider, differentiable in m; 1 where the norm is zero (so is the row).

    The norm is rounded to m's dtype first, so that a magnitude which was made from it gives exactly 1.
    """
    norm = wide(norm.detach().to(magnitude.dtype))
    some = norm > 0
    return torch.where(some, magnitude / torch.where(some, norm, 1.0), 1.0)


def row_squares(weight: Tensor) -> Tensor:
    """Sum of squares of each row, (out, in) -> (out,), in float32 or wider."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32)).square_()


def row_norms(squares: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Euclidean norm of each row of W + s B A, (out,), in float32 or wider, from r x r Gram matrices:

        ||w + s b A||^2 = ||w||^2 + s (2 w A^T + s b A A^T) . b

    Exactly the root of ``squares`` where B is zero. An update that cancels most of a row costs precision: the error is
    relative to the squares of what is summed, so a row left at a tenth of its norm has 100 times the error.

    Args:
        squares: (out,), :func:`row_squares` of W.
        weight: W (out, in).
        A: (r, in) and
        B: (out, r).
        scaling: s.
    """
    A, B = wide(A), wide(B)
    inner = _times(weight, A).mul_(2).addmm_(B, A @ A.t(), alpha=scaling)  # (out, r)
    return (squares + scaling * (inner * B).sum(1)).clamp_min_(0).sqrt_()


def _times(weight: Tensor, A: Tensor) -> Tensor:
    """W A^T in A's dtype, (out, in) @ (in, r) -> (out, r).

    A half-precision W is multiplied as it is, for A is rounded to its dtype in forward too: the norm is off by about
    2^-9 |s B A| / |W|, a hundredth of the rounding of an output, at half the cost.
    """
    if weight.dtype == A.dtype or weight.dtype not in (torch.bfloat16, torch.float16):
        return weight.to(A.dtype) @ A.t()
    A = A.to(weight.dtype)
    if weight.device.type == "cuda":
        return torch.mm(weight, A.t(), out_dtype=torch.float32)
    return (weight @ A.t()).float()


def _beside(bias: Tensor, magnitude: Tensor) -> Tensor:
    """A bias (d,) in the shape of the magnitude."""
    return bias.reshape(magnitude.shape)


def _sum_like(t: Tensor, shape: torch.Size) -> Tensor:
    """t summed over all dimensions along which a tensor of ``shape`` is broadcast, in float32 or wider."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    if t.device.type == "cpu" and t.dtype != dtype and len(shape) == 1 and t.numel() % (GROUP * shape[0]) == 0:
        # a CPU would make a wide copy of it all; a group's sum is wide too, and its rounding as small as the terms'
        t = t.reshape(-1, GROUP, *shape).sum(1)
    lead = t.ndim - len(shape)
    over = [*range(lead), *(lead + i for i, n in enumerate(shape) if n == 1)]
    return (t.sum(over, dtype=dtype) if over else t.to(dtype)).reshape(shape)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, bias: Tensor | None, magnitude: Tensor, norm: Tensor) -> Tensor:
        more = gain(magnitude, norm) - 1
        if out.device.type == "cpu" and out.dtype != more.dtype and bool((more > -0.5).all()):
            # a CPU is faster where all are of one type; below -0.5 the sum would cancel and show the rounding
            more = more.to(out.dtype)
        plain = out if bias is None else out - _beside(bias, magnitude).to(out.dtype)
        y = torch.addcmul(out, plain, more, out=torch.empty_like(out))
        ctx.save_for_backward(y, bias, magnitude, more)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        try:
            y, bias, magnitude, more = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise RuntimeError(
                "the output of a DoRA layer was changed in place before backward, which needs it; "
                "use the activation that follows the layer with inplace=False"
            ) from error
        need_out, need_bias, need_m = ctx.needs_input_grad[:3]
        d_out = d_bias = d_m = None
        if need_bias:
            d_bias = (_sum_like(grad, magnitude.shape) * -more).reshape(bias.shape).to(bias.dtype)
        if need_m:
            # y - bias = (m / norm) z and the derivative is z / norm, so z itself need not be kept
            plain = y if bias is None else y - _beside(bias, magnitude).to(y.dtype)
            # the terms of float16 may not fit it, as they grow with the scale of the loss
            terms = wide(grad) * plain if grad.dtype == torch.float16 else grad * plain
            d_m = _sum_like(terms, magnitude.shape).div_(magnitude).to(magnitude.dtype)
            d_m = torch.where(magnitude == 0, 0, d_m)
            if terms.dtype == grad.dtype:
                d_out = terms  # its memory: a second buffer of this size costs a CPU more than the product
        if need_out:
            d_out = torch.addcmul(grad, grad, more, out=torch.empty_like(grad) if d_out is None else d_out)
        else:
            d_out = None
        return d_out, d_bias, d_m, None
