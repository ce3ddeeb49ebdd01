"""Cross entropy of the supervised rows only, in chunks.

Rows whose label is -100 never reach the output head, no more than one chunk of logits exists at a time, the gradient of
the hidden states is made in the forward pass, and a frozen head gets no weight gradient. After cut cross-entropy
(Wijmans et al. 2024, arXiv 2411.09009) and TRL's chunked loss; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deltaw.ops.order import first_order
from deltaw.weights import WeightStore

__all__ = ["IGNORE", "supervised_cross_entropy", "supervised_cross_entropy_through"]

IGNORE = -100
CHUNK_BYTES = 64 * 2**20  # of float32 logits at a time: small beside any model, large enough for full matmul speed


def supervised_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    store: WeightStore,
    bias: Tensor | None = None,
    *,
    divisor: Tensor | float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum of the supervised rows' cross entropies over ``divisor``, through a frozen linear head.

    logits = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap), in float32 from the head's product on.

    Args:
        hidden: (..., d).
        labels: (...), the class of each row, or -100 for a row without loss. Already shifted.
        store: the head's weight (vocabulary, d), frozen.
        divisor: what to divide the sum by; None: the number of supervised rows.
        softcap: logits are squashed into (-softcap, softcap) (Gemma 2, arXiv 2408.00118, section 2).
        chunk_rows: rows whose logits are made at once; default: about 64 MiB of them.

    Returns:
        Scalar in float32; 0 (with a zero gradient) when no row is supervised.
    """
    kept = _supervised(labels)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept)  # (m, d)
    targets = labels.reshape(-1).index_select(0, kept)
    if divisor is None:
        divisor = float(max(1, len(kept)))
    step = chunk_rows or max(1, CHUNK_BYTES // (4 * store.shape[0]))
    return _SupervisedCrossEntropy.apply(rows, targets, store, bias, logit_scale, softcap, step) / divisor


def supervised_cross_entropy_through(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    *,
    divisor: Tensor | float | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """The same through any head (one that trains, or carries adapters): each chunk's logits are made again in backward.

    Args:
        head: (m, d) -> (m, vocabulary), differentiable.
        vocabulary: width of the logits, for the size of a chunk.
    """
    kept = _supervised(labels)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, kept)
    targets = labels.reshape(-1).index_select(0, kept)
    if divisor is None:
        divisor = float(max(1, len(kept)))
    step = chunk_rows or max(1, CHUNK_BYTES // (4 * vocabulary))

    def chunk_loss(piece: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(shape_logits(head(piece).float(), logit_scale, softcap), wanted, reduction="sum")

    total = rows.sum() * 0.0  # keeps the graph alive when nothing is supervised
    for start in range(0, len(kept), step):
        piece = slice(start, start + step)
        total = total + checkpoint(chunk_loss, rows[piece], targets[piece], use_reentrant=False)
    return total.float() / divisor


def shape_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scaling, then soft-capping."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _supervised(labels: Tensor) -> Tensor:
    return (labels.reshape(-1) != IGNORE).nonzero().squeeze(-1)


class _SupervisedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        targets: Tensor,
        store: WeightStore,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        step: int,
    ) -> Tensor:
        need_grad = ctx.needs_input_grad[0]
        dtype = rows.dtype
        total = torch.zeros((), dtype=torch.float32 if dtype != torch.float64 else dtype, device=rows.device)
        grad_rows = torch.empty_like(rows) if need_grad else None
        with store.lent(dtype) as weight:  # (v, d)
            for start in range(0, rows.shape[0], step):
                piece, wanted = rows[start : start + step], targets[start : start + step]
                raw = F.linear(piece, weight, None if bias is None else bias.to(dtype)).to(total.dtype)  # (m, v)
                logits = shape_logits(raw, scale, softcap)
                peak = logits.amax(-1, keepdim=True)
                index = torch.arange(len(wanted), device=rows.device)
                chosen = logits[index, wanted]
                probabilities = logits.sub_(peak).exp_()  # reuses the logits' memory
                mass = probabilities.sum(-1, keepdim=True)
                total += (mass.log() + peak).sum() - chosen.sum()
                if grad_rows is None:
                    continue
                probabilities.div_(mass)
                probabilities[index, wanted] -= 1.0  # d loss / d logits
                if softcap is not None:
                    # d/dz [c tanh(z / c)] = 1 - tanh^2; the squashed value is made again, its memory was reused
                    probabilities.mul_(1 - torch.tanh(raw * (scale / softcap)) ** 2)
                if scale != 1.0:
                    probabilities.mul_(scale)
                torch.mm(probabilities.to(dtype), weight, out=grad_rows[start : start + step])
        ctx.save_for_backward(grad_rows)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_rows,) = ctx.saved_tensors
        scaled = None if grad_rows is None else grad_rows * grad.to(grad_rows.dtype)
        return scaled, None, None, None, None, None, None
