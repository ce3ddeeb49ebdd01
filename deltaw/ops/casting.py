"""In which dtype an operation computes: what the hand-written operations share. Knows nothing of any of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast", "bias_gradient", "cast", "is_wide"]


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` itself where it is of that dtype already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def autocast(x: Tensor) -> Tensor:
    """The input as a linear layer would take it: in autocast's dtype where that is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def is_wide(dtype: torch.dtype) -> bool:
    """Whether sums in ``dtype`` lose no update that matters: anything but half precision."""
    return dtype not in (torch.bfloat16, torch.float16)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over rows, (n, out) -> (out,), in float32 or wider, then in ``dtype``."""
    return cast(grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)), dtype)
