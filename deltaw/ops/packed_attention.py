"""Causal attention inside each of many examples that lie end to end in one row; no mask of (tokens, tokens) is made.

Examples of like length are gathered into a few padded groups, each two batched products with a softmax between, as in
:mod:`deltaw.ops.attention`; their rows are written back to where they came from. Each token is read and written once,
so that backward is gathers too. Examples too long for plain products go to PyTorch's kernel one by one. Knows nothing
of models.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SHORT", "packed_attention", "packed_attention_reference"]

#: longest example (tokens) that the plain products are taken for, by dtype: beyond it the flash kernel is as fast
SHORT = {torch.bfloat16: 384, torch.float32: 160}
#: what starting another group costs, in scores of one head: padding that wastes less is left in
GROUP_COST = 4000


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(scale q k^T + mask) v, where a token sees the tokens of its own example up to itself.

    Args:
        q: (1, h, t, d).
        k: (1, g, t, d), g divides h: consecutive query heads share a key head.
        v: (1, g, t, d_v).
        bounds: (examples + 1,) int32: where each example starts; the last is t.
        window: a token sees as many at most, itself included; None: all.
        dropout: share of the probabilities that are dropped.

    Returns:
        (1, t, h, d_v).
    """
    if torch.compiler.is_compiling() and not dropout:
        return _packed(q, k, v, bounds, scale, window or 0)
    lengths = _lengths(bounds)
    short = SHORT.get(q.dtype, 0) if q.device.type == "cpu" and not dropout else 0
    if max(lengths) <= short:
        return _packed(q, k, v, bounds, scale, window or 0)
    parts = _runs(lengths, short)
    outs = [
        _packed(qs, ks, vs, _bounds(run), scale, window or 0)
        if len(run) > 1 or run[0] <= short
        else _whole(qs, ks, vs, scale, window, dropout)
        for run, qs, ks, vs in zip(parts, *(x.split([sum(run) for run in parts], 2) for x in (q, k, v)), strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """The same through one mask of (t, t): what is meant, in four lines."""
    t, rep = q.shape[2], q.shape[1] // k.shape[1]
    example = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    ago = torch.arange(t)[:, None] - torch.arange(t)[None, :]
    seen = (example[:, None] == example[None, :]) & (ago >= 0) & (ago < (window or t))
    scores = (scale * q @ k.repeat_interleave(rep, 1).transpose(2, 3)).masked_fill(~seen.to(q.device), float("-inf"))
    return (scores.softmax(-1) @ v.repeat_interleave(rep, 1)).transpose(1, 2)


def probabilities(q: Tensor, k: Tensor, t: int, window: int = 0) -> Tensor:
    """softmax(q k^T) over what may be seen.

    Args:
        q: (b, r t, d), scaled; r heads that share keys, one after the other.
        k: (b, t, d).
        window: see above; 0 for all.

    Returns:
        (b, r t, t).
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    shaped = scores.view(scores.shape[0], -1, t, t)
    if torch.compiler.is_compiling():
        shaped = shaped + _unseen.__wrapped__(t, window, q.dtype, q.device)
    else:
        shaped.add_(_unseen(t, window, q.dtype, q.device))
    return torch.softmax(shaped, -1).view(scores.shape)


@functools.lru_cache(maxsize=16)
def _unseen(t: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(t, t): minus infinity at what may not be seen; the same for every layer of a step, so it is kept."""
    mask = torch.full((t, t), float("-inf"), dtype=dtype, device=device)
    future = mask.triu(1)
    return future + mask.tril(-window) if 0 < window < t else future


# --- examples that are too long for plain products ----------------------------------------------------------


def _runs(lengths: tuple[int, ...], short: int) -> list[tuple[int, ...]]:
    """Consecutive short examples together, each longer one alone."""
    runs: list[tuple[int, ...]] = []
    for length in lengths:
        if runs and length <= short and runs[-1][-1] <= short:
            runs[-1] = (*runs[-1], length)
        else:
            runs.append((length,))
    return runs


def _whole(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
    """One example through PyTorch's own kernel; (1, t, h, d_v)."""
    t, mask = q.shape[2], None
    if window is not None and window < t:
        mask = _unseen(t, window, q.dtype, q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout, enable_gqa=True
    )
    return out.transpose(1, 2)


# --- where the rows of a group come from, and where they go -------------------------------------------------


class _Group(NamedTuple):
    """Examples of like length: ``count`` of them, ``width`` places each, from place ``start`` of all on."""

    start: int
    count: int
    width: int


class _Layout(NamedTuple):
    """Where the tokens of a row stand in groups."""

    groups: tuple[_Group, ...]
    taken: Tensor  # (places,) the token at each place; padding repeats the last of its example
    padding: Tensor  # (places,) bool
    put: Tensor  # (t,) the place of each token


def _lengths(bounds: Tensor) -> tuple[int, ...]:
    ends = bounds.tolist()
    return tuple(end - start for start, end in itertools.pairwise(ends))


@functools.lru_cache(maxsize=64)
def _bounds(lengths: tuple[int, ...]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


@functools.lru_cache(maxsize=16)
def _layout(lengths: tuple[int, ...]) -> _Layout:
    """Groups by decreasing length; a group ends where its padding would cost more than another group."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    members: list[list[int]] = []
    wasted = 0
    for i in order:
        if members:
            wasted += lengths[members[-1][0]] ** 2 - lengths[i] ** 2
        if not members or wasted > GROUP_COST:
            members.append([])
            wasted = 0
        members[-1].append(i)
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    groups, taken, padding, place = [], [], [], 0
    for group in members:
        width = lengths[group[0]]
        own, step = sizes[group, None], torch.arange(width)
        taken.append((starts[group, None] + torch.minimum(step, own - 1)).flatten())
        padding.append((step >= own).flatten())
        groups.append(_Group(place, len(group), width))
        place += len(group) * width
    token, empty = torch.cat(taken), torch.cat(padding)
    put = torch.empty(int(sizes.sum()), dtype=torch.int64)
    real = (~empty).nonzero().squeeze(1)
    put[token[real]] = real
    return _Layout(tuple(groups), token, empty, put)


@functools.lru_cache(maxsize=32)
def _read(lengths: tuple[int, ...], heads: int, shared: int, by_token: bool) -> tuple[Tensor, Tensor]:
    """Rows of a (heads, t) tensor, in the order of its memory, for groups of (examples, shared, heads / shared, width);
    and which of the rows so taken are padding."""
    layout, t = _layout(lengths), sum(lengths)
    head = torch.arange(heads).view(1, shared, heads // shared, 1)
    rows, empty = [], []
    for group in layout.groups:
        where = slice(group.start, group.start + group.count * group.width)
        token = layout.taken[where].view(group.count, 1, 1, group.width)
        rows.append((token * heads + head if by_token else head * t + token).flatten())
        empty.append(layout.padding[where].view(group.count, 1, 1, group.width).expand_as(token + head).flatten())
    return torch.cat(rows), torch.cat(empty).nonzero().squeeze(1)


@functools.lru_cache(maxsize=32)
def _written(lengths: tuple[int, ...], heads: int, shared: int) -> Tensor:
    """(t heads,): the row of the groups that holds each token's heads, token by token."""
    layout, rep = _layout(lengths), heads // shared
    rows = torch.empty(len(layout.taken), heads, dtype=torch.int64)
    for group in layout.groups:
        n, w = group.count, group.width
        index = torch.arange(n * heads * w).view(n, heads, w).transpose(1, 2) + group.start * heads
        rows[group.start : group.start + n * w] = index.reshape(n * w, heads)
    assert rep * shared == heads
    return rows[layout.put].flatten()


def _rows(x: Tensor) -> tuple[Tensor, bool]:
    """(1, heads, t, d) as rows of d in the order of its memory, and whether tokens come first in it."""
    turned = x.transpose(1, 2)
    if turned.is_contiguous() and not x.is_contiguous():
        return turned.reshape(-1, x.shape[-1]), True
    return x.reshape(-1, x.shape[-1]), False


def _gather(x: Tensor, lengths: tuple[int, ...], shared: int) -> Tensor:
    rows, by_token = _rows(x)
    return rows.index_select(0, _read(lengths, x.shape[1], shared, by_token)[0])


def _scatter(rows: Tensor, lengths: tuple[int, ...], heads: int, shared: int) -> Tensor:
    """(1, t, heads, d), contiguous."""
    return rows.index_select(0, _written(lengths, heads, shared)).view(1, -1, heads, rows.shape[-1])


# --- the operation, declared once for plain calls and for the compiler --------------------------------------


@torch.library.custom_op("deltaw::packed_attention", mutates_args=())
def _packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int) -> Tensor:
    lengths, h, g = _lengths(bounds), q.shape[1], k.shape[1]
    qs, ks, vs = _gather(q, lengths, g).mul_(scale), _gather(k, lengths, g), _gather(v, lengths, g)
    out = q.new_empty(qs.shape[0], v.shape[-1])
    for group in _layout(lengths).groups:
        q_, k_, v_, out_ = _views(group, h, g, (qs, ks, vs, out))
        torch.bmm(probabilities(q_, k_, group.width, window), v_, out=out_)
    return _scatter(out, lengths, h, g)


@torch.library.custom_op("deltaw::packed_attention_backward", mutates_args=())
def _packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    lengths, h, g = _lengths(bounds), q.shape[1], k.shape[1]
    qs, ks, vs = _gather(q, lengths, g).mul_(scale), _gather(k, lengths, g), _gather(v, lengths, g)
    grad = grad.transpose(1, 2)
    rows, by_token = _rows(grad)
    index, padding = _read(lengths, h, g, by_token)
    gs = rows.index_select(0, index).index_fill_(0, padding, 0)  # padding repeats a token, which must not count twice
    dq, dk, dv = torch.empty_like(qs), torch.empty_like(ks), torch.empty_like(vs)
    for group in _layout(lengths).groups:
        q_, dq_, k_, dk_, v_, dv_, g_ = _views(group, h, g, (qs, dq, ks, dk, vs, dv, gs))
        p = probabilities(q_, k_, group.width, window)
        torch.bmm(p.transpose(1, 2), g_, out=dv_)
        ds = torch._softmax_backward_data(torch.bmm(g_, v_.transpose(1, 2)), p, -1, p.dtype)
        torch.bmm(ds, k_, out=dq_)
        torch.bmm(ds.transpose(1, 2), q_, out=dk_)  # q is scaled already
    dq.mul_(scale)
    return tuple(_scatter(x, lengths, n, g).transpose(1, 2) for x, n in ((dq, h), (dk, g), (dv, g)))  # type: ignore[return-value]


def _views(group: _Group, h: int, g: int, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The rows of one group, each as (examples g, rows of a key head, d)."""
    places, views = group.count * group.width, []
    total = tensors[0].shape[0] // h
    for x in tensors:
        heads = x.shape[0] // total
        rows = x[group.start * heads : (group.start + places) * heads]
        views.append(rows.view(group.count * g, heads // g * group.width, x.shape[-1]))
    return views


@_packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int) -> Tensor:
    return q.new_empty(1, q.shape[2], q.shape[1], v.shape[-1])


@_packed_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bounds = ctx.saved_tensors
    return *_packed_backward(grad, q, k, v, bounds, ctx.scale, ctx.window), None, None, None


_packed.register_autograd(_backward, setup_context=_setup)
