"""A weight in four bits that passes for a dense tensor: it is read when an operation needs its numbers, and forgotten.

What autograd saves of it for backward are the packed bytes, so no dense copy outlives its product; and of a view,
such as one expert of many, only that part is read. Knows nothing of modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from deltaw.quant.ops import dequantize_4bit
from deltaw.quant.packed import Packed

__all__ = ["LazyWeight", "part"]


def part(packed: Packed, first: int, last: int) -> Packed:
    """Elements ``first`` to ``last`` of the flattened weight, (last - first,), in the same memory.

    Args:
        first: a multiple of the blocksize, times the nested blocksize where absmax is quantized too.
    """
    blocks = slice(first // packed.blocksize, -(-last // packed.blocksize))
    nested = None
    if packed.nested_absmax is not None:
        size = packed.nested_blocksize
        nested = packed.nested_absmax[blocks.start // size : -(-blocks.stop // size)]
    codes = packed.codes.view(-1)[first // 2 : (last + 1) // 2]
    absmax = packed.absmax[blocks]
    return replace(packed, codes=codes, absmax=absmax, nested_absmax=nested, shape=torch.Size((last - first,)))


class LazyWeight(Tensor):
    """A view of a packed weight: every operation but a view or a cast reads it first, and gives plain tensors.

    Args:
        packed: the weight.
        like: a tensor on the meta device, of the size, strides, offset and dtype of this view of it; None: the whole.
    """

    packed: Packed

    @staticmethod
    def __new__(cls, packed: Packed, like: Tensor | None = None) -> LazyWeight:
        like = torch.empty(packed.shape, dtype=packed.dtype, device="meta") if like is None else like
        lazy = Tensor._make_wrapper_subclass(
            cls,
            like.size(),
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=packed.device,
        )
        lazy.packed = packed
        return lazy

    # what an operation gives is no weight
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], LazyWeight):
            lazy: LazyWeight = args[0]
            if func.is_view:
                seen = func(_geometry(lazy, lazy.dtype), *args[1:], **kwargs)
                return tree_map(lambda like: LazyWeight(lazy.packed, like), seen)
            if (
                func is torch.ops.aten._to_copy.default
                and set(kwargs) == {"dtype"}
                and kwargs["dtype"].is_floating_point
            ):
                return LazyWeight(lazy.packed, _geometry(lazy, kwargs["dtype"]))
        args, kwargs = tree_map(lambda value: value.read() if isinstance(value, LazyWeight) else value, (args, kwargs))
        return func(*args, **kwargs)

    def read(self) -> Tensor:
        """The numbers, as a plain tensor of the same strides; of a view only the blocks that it lies in."""
        packed, offset = self.packed, int(self.storage_offset())
        span = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride(), strict=True)) if self.numel() else 0
        unit = packed.blocksize * (packed.nested_blocksize if packed.nested else 1)
        first = offset // unit * unit
        last = min(-(-(offset + span) // unit) * unit, packed.numel())
        flat = dequantize_4bit(part(packed, first, last)).to(self.dtype)
        return flat.as_strided(self.shape, self.stride(), offset - first)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyWeight({self.packed.quant_type}, size={tuple(self.shape)}, dtype={self.dtype})"


def _geometry(lazy: LazyWeight, dtype: torch.dtype) -> Tensor:
    """A tensor without memory that lies in its storage as ``lazy`` does in the whole weight."""
    whole = torch.empty(lazy.packed.numel(), dtype=dtype, device="meta")
    return whole.as_strided(lazy.shape, lazy.stride(), lazy.storage_offset())
