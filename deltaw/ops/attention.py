"""Causal attention for short sequences on a CPU: plain matrix products, registered with transformers by name.

PyTorch's flash kernel has no use for a CPU's matrix throughput when sequences are short; two batched products with a
softmax between are faster up to a few hundred tokens. Query heads that share a key head are stacked, so keys and values
are never repeated; probabilities are made again in backward, so nothing quadratic in the length is kept. Rows that hold
several examples, with the bounds that flash attention takes (``cu_seq_lens_q``), go through
:mod:`deltaw.ops.packed_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deltaw.errors import ModelError
from deltaw.ops.order import first_order
from deltaw.ops.packed_attention import SHORT, packed_attention, probabilities

__all__ = ["ATTENTION", "causal_attention", "example_bounds"]

#: the name under which transformers finds this attention
ATTENTION = "deltaw"

_bounded: ContextVar[bool] = ContextVar("bounded", default=False)


@contextmanager
def example_bounds(given: bool = True) -> Iterator[None]:
    """Inside, no mask is made for this attention: the bounds of the examples reach it as ``cu_seq_lens_q``.

    Args:
        given: False, where a batch has no bounds, for a mask as ever.
    """
    token = _bounded.set(given)
    try:
        yield
    finally:
        _bounded.reset(token)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + causal mask) v.

    Args:
        q: (b, h, t, d).
        k: (b, g, t, d), g divides h: consecutive query heads share a key head.
        v: (b, g, t, d_v).

    Returns:
        (b, h, t, d_v).
    """
    if torch.compiler.is_compiling():
        return _attend(*_stack(q, k, v, scale), q.shape[2])[0].view(*q.shape[:3], v.shape[-1])
    return _CausalAttention.apply(q, k, v, scale)  # type: ignore[no-any-return]


def _stack(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Query heads of one key head side by side: (b g, h/g t, d), (b g, t, d), (b g, t, d_v); q is scaled."""
    b, h, t, d = q.shape
    g = k.shape[1]
    return (q * scale).reshape(b * g, h // g * t, d), k.reshape(b * g, t, d), v.reshape(b * g, t, v.shape[-1])


def _attend(q: Tensor, k: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor]:
    p = probabilities(q, k, t)
    return torch.bmm(p, v), p


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        stacked = _stack(q, k, v, scale)
        ctx.save_for_backward(*stacked)
        ctx.scale, ctx.shapes = scale, (q.shape, k.shape, v.shape)
        return _attend(*stacked, q.shape[2])[0].view(*q.shape[:3], v.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        q_shape, k_shape, v_shape = ctx.shapes
        p = probabilities(q, k, q_shape[2])
        grad = grad.reshape(q.shape[0], q.shape[1], v.shape[-1])
        dv = torch.bmm(p.transpose(1, 2), grad)
        dp = torch.bmm(grad, v.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq = torch.bmm(ds, k).mul_(ctx.scale)
        dk = torch.bmm(ds.transpose(1, 2), q)  # q is scaled already
        return dq.view(q_shape), dk.view(k_shape), dv.view(v_shape), None


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: takes what the plain products do faster, hands the rest to sdpa."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bounds, t = kwargs.get("cu_seq_lens_q"), query.shape[2]
    if attention_mask is None and bounds is not None:
        strange = [name for name in ("softcap", "position_bias", "cache", "s_aux") if kwargs.get(name) is not None]
        if strange or not causal:
            raise ModelError(
                f"{type(module).__name__} attends in a way that is not known for several examples in a row "
                f"({', '.join(strange) or 'not causal'}): leave out packing and padding_free"
            )
        window = kwargs.get("sliding_window")
        return packed_attention(query, key, value, bounds, scale, window, dropout), None
    plain = (
        attention_mask is None
        and causal
        and not dropout
        and query.device.type == "cpu"
        and 1 < t <= SHORT.get(query.dtype, 0)
        and key.shape[2] == t
        and query.dtype == key.dtype == value.dtype
        and kwargs.get("softcap") is None
        and kwargs.get("position_bias") is None
        and kwargs.get("cache") is None
        and torch.is_grad_enabled()
    )
    if not plain:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    out = causal_attention(query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    if _bounded.get() and attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _forward)
AttentionMaskInterface.register(ATTENTION, _mask)
