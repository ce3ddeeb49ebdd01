"""A weight in four bits under the weight-store contract. Knows nothing of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaw.quant.autograd import few, lent, linear, read
from deltaw.quant.ops import quantize_4bit
from deltaw.quant.packed import Packed
from deltaw.weights import WeightStore

if TYPE_CHECKING:
    from deltaw.quant.linear import NF4Linear

__all__ = ["QuantizedWeight"]


class QuantizedWeight(WeightStore):
    """The weight of an :class:`~deltaw.quant.linear.NF4Linear`: read anew at each use, never trained."""

    module: NF4Linear

    @property
    def packed(self) -> Packed:
        return self.module.packed

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.module.out_features, self.module.in_features))

    @property
    def dtype(self) -> torch.dtype:
        """In which it is read back, whatever dtype the rest of the model was moved to since."""
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    @property
    def quantized(self) -> bool:
        return True

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return self.module.compute_dtype

    def stored(self) -> Sequence[Tensor]:
        return list(self.packed.tensors().values())

    def dequantize(self) -> Tensor:
        return read(self.packed, self.dtype)

    def lent(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        return lent(self.packed, dtype)

    @torch.no_grad()
    def requantize_(self, weight: Tensor) -> None:
        """Quantizes ``weight`` as the present one was: same type, same blocks, double quantization or not."""
        own = self.packed
        _copy(quantize_4bit(weight, own.quant_type, own.blocksize, nested=own.nested), own)

    def keep(self) -> Packed:
        return self.packed.clone()

    @torch.no_grad()
    def restore_(self, kept: Packed) -> None:
        _copy(kept, self.packed)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, self.packed, bias, self.module.compute_dtype)

    def few(self, x: Tensor) -> Tensor | None:
        return few(x, self.packed)


def _copy(source: Packed, target: Packed) -> None:
    ours = target.tensors()
    for name, tensor in source.tensors().items():
        ours[name].copy_(tensor)
