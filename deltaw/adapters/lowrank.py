"""What all methods have in common whose update of a linear layer is a product of two thin matrices: ΔW = s B A.

LoRA trains the factors themselves; AdaLoRA, LoHa and PiSSA make them from what they train. Either way the layer is one
fused operation. Knows nothing of any method.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from deltaw.adapters.base import Adapter
from deltaw.ops import lowrank_linear
from deltaw.weights import WeightStore, wide

__all__ = ["Factors", "LowRank"]


class Factors(NamedTuple):
    """ΔW = scaling B A on one linear layer, as it is now.

    Attributes:
        A: (r, in).
        B: (out, r).
        scaling: s.
        bias: the adapter's own (out,), to be scaled too; or None.
        dropout: probability with which an element of the adapter's input is dropped now; 0 outside training.
    """

    A: Tensor
    B: Tensor
    scaling: float
    bias: Tensor | None = None
    dropout: float = 0.0


class LowRank(Adapter):
    """An adapter of a linear layer that is given by its factors."""

    @abstractmethod
    def factors(self) -> Factors:
        """The factors as they are now, differentiable in the adapter's parameters."""

    @property
    def plain(self) -> bool:
        """Whether the factors say all that the adapter does to the layer; a method that overrides :meth:`linear` does
        more."""
        return type(self).linear is LowRank.linear

    def delta_weight(self) -> Tensor:
        f = self.factors()
        return (wide(f.B) @ wide(f.A)).mul_(f.scaling)  # (out, r) @ (r, in)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        own, scaling = self.factors().bias, self.factors().scaling
        return bias if own is None or bias is None else bias + wide(own) * scaling

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        f = self.factors()
        x = F.dropout(x, f.dropout) if f.dropout else x
        low = F.linear(x, f.A.to(x.dtype))  # (..., r)
        up = F.linear(low, f.B.to(x.dtype), None if f.bias is None else f.bias.to(x.dtype))
        return base_out + (up * f.scaling).to(base_out.dtype)

    def linear(self, x: Tensor, store: WeightStore, bias: Tensor | None) -> Tensor:
        f = self.factors()
        if f.bias is not None:
            extra = f.bias * f.scaling
            bias = extra if bias is None else bias + extra.to(bias.dtype)
        return lowrank_linear(x, store, bias, f.A, f.B, f.scaling, dropout=f.dropout)
