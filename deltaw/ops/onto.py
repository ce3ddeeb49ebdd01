"""The base's product accumulated onto a small update, and rounded once: why a half-precision adapter loses nothing.

Knows nothing of how the update was made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.ops.casting import is_wide

__all__ = ["onto"]


def onto(update: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """update + rows W^T + bias, written over ``update``: the large product is accumulated in float32 onto the small one
    and rounded once.

    An update that is added to the base's rounded output is lost where it is smaller than half a unit in the output's
    last place, and early in training most of it is. A bias would swallow it in the same way, so in half precision the
    bias joins the product as one more column. A zero update gives bitwise the base's own output.

    Args:
        update: (n, out), contiguous.
        rows: (n, in).
        weight: (out, in) and
        bias: (out,) or None, in the dtype of ``rows``.
    """
    if bias is not None and not is_wide(rows.dtype):
        if _is_zero(update):
            return F.linear(rows, weight, bias)  # one more column may change the order of the sum
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        weight = torch.cat([weight, bias[:, None]], 1)
    elif bias is not None:
        update += bias
    return update.addmm_(rows, weight.t())


def _is_zero(update: Tensor) -> bool:
    """As an adapter starts. Asked on a CPU only: on an accelerator the answer would stall it at every layer."""
    return update.device.type == "cpu" and not (bool(update[:1].any()) or bool(update.any()))
