"""Root-mean-square norm with a frozen weight (Zhang & Sennrich 2019, arXiv 1910.07467), keeping no float32 copy.

Saved for backward are x as it came and one number a row; plain autograd keeps x in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltaw.ops.order import first_order

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)), rounded to x's dtype before the weight, as transformers does it.

    Args:
        x: (..., d).
        weight: (d,), frozen.
    """
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        return weight * (wide * rstd).to(x.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        unit = x * rstd  # x / rms, in float32
        d_unit = (grad * weight).to(unit.dtype)
        along = torch.linalg.vecdot(d_unit, unit).unsqueeze(-1).div_(-x.shape[-1])
        return d_unit.addcmul_(unit, along).mul_(rstd).to(x.dtype), None, None
