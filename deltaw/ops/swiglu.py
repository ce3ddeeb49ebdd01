"""SwiGLU: silu(gate) * up (Shazeer 2020, arXiv 2002.05202), keeping gate and up and nothing else for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.ops.order import first_order
from deltaw.ops.recipe import remember

__all__ = ["swiglu"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, bitwise what PyTorch gives.

    Plain autograd keeps silu(gate) and the product too; here a following low-rank linear makes the product again.
    """
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return remember(_Swiglu.apply(gate, up), _product, gate, up)  # type: ignore[arg-type]


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grad)
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return d_gate, d_up
