"""The base's product accumulated onto a small update, and rounded once: why a half-precision adapter loses nothing.

Knows nothing of how the update was made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.ops.casting import cast, is_wide
from deltaw.weights import WeightStore

__all__ = ["added", "onto", "onto_store"]


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


def onto_store(update: Tensor, rows: Tensor, store: WeightStore, bias: Tensor | None, *, recorded: bool) -> Tensor:
    """:func:`onto` with the weight of ``store``, which is read for this one product.

    Args:
        bias: (out,) in any floating dtype, or None.
        recorded: whether a gradient may be asked for. If not, a store may have a faster way for a few rows; it sums in
            float32, and what is added to it is added there before all is rounded once.
    """
    base = None if recorded else store.few(rows)
    if base is not None:
        return added(base, update, bias, rows.dtype)
    with store.lent(rows.dtype) as weight:
        return onto(update, rows, weight, None if bias is None else cast(bias, rows.dtype))


def added(base: Tensor, update: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """base + update + bias in ``dtype``, rounded once; ``base`` is float32 (n, out) and is written over."""
    base += update
    return cast(base if bias is None else base.add_(bias), dtype)


def _is_zero(update: Tensor) -> bool:
    """As an adapter starts. Asked on a CPU only: on an accelerator the answer would stall it at every layer."""
    return update.device.type == "cpu" and not (bool(update[:1].any()) or bool(update.any()))
