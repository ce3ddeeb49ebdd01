"""What a weight is in four bits: the bytes, the statistics of its blocks, and how they are to be read.

Plain data in the layout of bitsandbytes (docs/quantization.md); knows nothing of how it is made, read or multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["BLOCKSIZES", "QUANT_TYPES", "READ_AS", "Packed", "uncast"]

QUANT_TYPES = ("nf4", "fp4")
#: dtypes that a weight can be quantized from and read back in
READ_AS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: absmax values that share one scale when they are quantized themselves (QLoRA, arXiv 2305.14314, section 3)
NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class Packed:
    """A weight of n elements in blocks of ``blocksize`` over the flattened array; a block may straddle rows.

    Attributes:
        codes: uint8 [(n + 1) // 2], two elements a byte, the even one in the high nibble.
        absmax: the largest magnitude of each block, ceil(n / blocksize) of them: float32, or, double quantized, uint8
            codes of the signed dynamic map.
        nested_absmax: float32, one for every ``nested_blocksize`` of ``absmax``; None unless double quantized.
        nested_offset: float32 [1], the mean of absmax, taken off before it was quantized; None unless double quantized.
        quant_type: ``"nf4"`` or ``"fp4"``.
        blocksize: elements that share one absmax.
        shape: of the weight.
        dtype: in which it is read back.
        nested_blocksize: absmax values that share one ``nested_absmax``.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    quant_type: str
    blocksize: int
    shape: torch.Size
    dtype: torch.dtype
    nested_blocksize: int = NESTED_BLOCKSIZE

    @property
    def nested(self) -> bool:
        """Whether absmax is itself quantized."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.shape.numel()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold it, by attribute name."""
        named = {name: getattr(self, name) for name in ("codes", "absmax", "nested_absmax", "nested_offset")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def nbytes(self) -> int:
        """Bytes it takes, statistics included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def clone(self) -> Packed:
        return replace(self, **{name: tensor.clone() for name, tensor in self.tensors().items()})

    def to(self, *args: object, **kwargs: object) -> Packed:
        """On another device; what it reads back as stays."""
        return replace(self, **{name: tensor.to(*args, **kwargs) for name, tensor in self.tensors().items()})  # type: ignore[arg-type]


def uncast(fn: Callable[[Tensor], Tensor], held: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``nn.Module._apply``, which of the ``held`` bytes and statistics changes the device alone, never the
    dtype."""
    packed = {id(tensor) for tensor in held}

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if id(tensor) not in packed or new.dtype == tensor.dtype else tensor.to(new.device)

    return moved
