"""One fused linear for a batch that mixes low-rank updates: each run of rows has its own, the base is multiplied once.

y = x W^T + b + s_i (drop_i(x) A_i^T) B_i^T on the rows of run i; rows without an update are the base's own, bitwise.
Kept for backward are x itself and x A^T, as in :mod:`deltaw.ops.lowrank`. Takes tensors and a weight store; knows
nothing of adapters or layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.ops.casting import autocast, bias_gradient, cast, is_wide
from deltaw.ops.lowrank import keep_mask
from deltaw.ops.onto import added
from deltaw.ops.order import first_order
from deltaw.ops.recipe import kept, made_again
from deltaw.weights import WeightStore

__all__ = ["Update", "mixed_linear", "mixed_linear_reference"]


class Update(NamedTuple):
    """scaling (drop(x) A^T) B^T.

    Attributes:
        A: (r, in) and
        B: (out, r): masters, usually float32; cast to x's dtype for each use, their gradients come in their own dtype.
        scaling: s.
        dropout: probability with which an element of the update's input is dropped; 0 outside training.
    """

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0


#: (rows of x's first dimension, index of their update; None for no update)
Runs = Sequence[tuple[int, int | None]]


def mixed_linear(x: Tensor, store: WeightStore, bias: Tensor | None, updates: Sequence[Update], runs: Runs) -> Tensor:
    """x W^T + bias, plus the update of its own on each run of rows.

    Args:
        x: (n, ..., in), any floating dtype; under autocast it is cast once, as a linear layer would.
        store: the base weight W (out, in); read again in backward, so a quantized weight is never kept dense.
        bias: (out,) or None.
        updates: one or more, all for one W; ranks may differ.
        runs: in order, n rows together; an update may have several runs.

    Returns:
        (n, ..., out) in x's dtype.

    Raises:
        RuntimeError: a second derivative is asked for (``create_graph=True``).
    """
    x = autocast(x)
    if torch.compiler.is_compiling() or store.requires_grad:  # for the reasons in lowrank_linear
        return mixed_linear_reference(x, store, bias, updates, runs)
    plan = _Plan(x, updates, runs)
    factors = [factor for update in updates for factor in (update.A, update.B)]
    recorded = torch.is_grad_enabled()
    return _MixedLinear.apply(x, bias, store, plan, plan.keep_mask(x), recorded, *factors)  # type: ignore[no-any-return]


def mixed_linear_reference(
    x: Tensor, store: WeightStore, bias: Tensor | None, updates: Sequence[Update], runs: Runs
) -> Tensor:
    """The same in plain PyTorch, run by run."""
    dtype = x.dtype
    base = F.linear(x, store.dequantize().to(dtype), None if bias is None else bias.to(dtype))
    pieces = []
    for (_, owner), fed, out in zip(runs, *(t.split([n for n, _ in runs]) for t in (x, base)), strict=True):
        if owner is not None:
            A, B, scaling, dropout = updates[owner]
            fed = F.dropout(fed, dropout) if dropout else fed
            out = out + F.linear(F.linear(fed, A.to(dtype)), (B * scaling).to(dtype))
        pieces.append(out)
    return torch.cat(pieces)


class _Plan:
    """Which of the N flattened rows go through which update, and the products that follow from it.

    m runs; a stack holds one matrix a run. Runs of equal length are one batched product, others one product each.
    """

    def __init__(self, x: Tensor, updates: Sequence[Update], runs: Runs) -> None:
        each = x[:1].numel() // x.shape[-1] if x.shape[0] else 0  # flattened rows in a row of x
        self.lengths = [n * each for n, _ in runs]
        self.owners = [owner for _, owner in runs]
        self.equal = len(set(self.lengths)) == 1
        self.rank = max(update.A.shape[0] for update in updates)
        self.scalings = [update.scaling for update in updates]
        # no update, no dropout: what is dropped of such a row is never used, so it may follow its neighbours
        self.rates = [updates[o].dropout for o in self.owners if o is not None]
        self.uniform = len(set(self.rates)) == 1

    # --- dropout ------------------------------------------------------------------------------------------------

    def keep_mask(self, x: Tensor) -> Tensor | None:
        """(N, in), True where the update's input is kept; None without dropout."""
        if not any(self.rates):
            return None
        rows = x.reshape(-1, x.shape[-1])
        if self.uniform:
            return keep_mask(rows, self.rates[0])
        keep = torch.ones(rows.shape, dtype=torch.bool, device=x.device)
        for piece, p in self._dropping(keep):
            piece.copy_(keep_mask(piece, p))
        return keep

    def drop(self, rows: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return rows
        dropped = rows * keep
        if self.uniform:
            return dropped.mul_(1 / (1 - self.rates[0]))
        for piece, p in self._dropping(dropped):
            piece.mul_(1 / (1 - p))
        return dropped

    def _dropping(self, rows: Tensor) -> list[tuple[Tensor, float]]:
        """(rows, dropout) of the runs that drop something."""
        updated = [rows for rows, owner in zip(rows.split(self.lengths), self.owners, strict=True) if owner is not None]
        return [(piece, p) for piece, p in zip(updated, self.rates, strict=True) if p]

    # --- products -----------------------------------------------------------------------------------------------

    def stack_A(self, As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(m, r, in)."""
        return cast(self._stack(As, 0, self.owners), dtype)

    def stack_B(self, Bs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(m, out, r), scaled."""
        return cast(self.scale_(self._stack(Bs, 1, self.owners), self.owners), dtype)

    def beside_B(self, Bs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(out, updates r): all updates side by side, scaled."""
        every = range(len(Bs))
        return cast(self.scale_(self._stack(Bs, 1, every), every).transpose(0, 1).flatten(1), dtype)

    def _stack(self, factors: Sequence[Tensor], axis: int, owners: Iterable[int | None]) -> Tensor:
        """The factors of ``owners`` in one new tensor, zero from their own rank on; anything where there is none."""
        if any(f.shape[axis] != self.rank for f in factors):
            missing = [self.rank - f.shape[axis] for f in factors]
            factors = [F.pad(f, (0, 0, 0, n) if axis == 0 else (0, n)) for f, n in zip(factors, missing, strict=True)]
        return torch.stack([factors[owner or 0] for owner in owners])

    def scale_(self, stack: Tensor, owners: Iterable[int | None]) -> Tensor:
        scalings = [self.scalings[owner or 0] for owner in owners]
        if len(set(scalings)) == 1:
            return stack.mul_(scalings[0])
        return stack.mul_(stack.new_tensor(scalings).view(-1, 1, 1))

    def times(self, rows: Tensor, stack: Tensor) -> Tensor:
        """(N, k) and (m, k, n) -> (N, n): each run through its own matrix; zero where there is no update."""
        out = rows.new_empty(rows.shape[0], stack.shape[2])
        pieces = out.split(self.lengths)
        if self.equal:
            torch.bmm(self._batched(rows), stack, out=self._batched(out))
        else:
            for piece, fed, matrix, owner in zip(pieces, rows.split(self.lengths), stack, self.owners, strict=True):
                if owner is not None:
                    torch.mm(fed, matrix, out=piece)
        for piece, owner in zip(pieces, self.owners, strict=True):
            if owner is None:
                piece.zero_()
        return out

    def outer(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, k) and (N, n) -> (m, k, n): left^T right of each run."""
        if self.equal:
            return cast(torch.bmm(self._batched(left).mT, self._batched(right)), dtype)
        pairs = zip(left.split(self.lengths), right.split(self.lengths), strict=True)
        return cast(torch.stack([a.t() @ b for a, b in pairs]), dtype)

    def _batched(self, rows: Tensor) -> Tensor:
        return rows.view(len(self.lengths), self.lengths[0], rows.shape[1])

    def sums(self, stack: Tensor) -> list[Any]:
        """One matrix a run -> one an update."""
        sums: list[Any] = [None] * len(self.scalings)
        for part, owner in zip(stack, self.owners, strict=True):
            if owner is not None:
                sums[owner] = part if sums[owner] is None else sums[owner] + part
        return sums


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        store: WeightStore,
        plan: _Plan,
        keep: Tensor | None,
        recorded: bool,
        *factors: Tensor,
    ) -> Tensor:
        dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        low = plan.times(plan.drop(rows, keep), plan.stack_A(factors[::2], dtype).mT)  # (N, r)
        base = None if recorded else store.few(rows)
        if base is not None:
            out = added(base, plan.times(low, plan.stack_B(factors[1::2], dtype).mT), bias, dtype)
        elif bias is not None and not is_wide(dtype):
            with store.lent(dtype) as weight:
                out = _one_product(rows, weight, low, plan, factors[1::2], cast(bias, dtype))
        else:
            # the small products first and the large one onto them, rounded once: see onto.py
            out = plan.times(low, plan.stack_B(factors[1::2], dtype).mT)  # (N, out)
            if bias is not None:
                out += bias
            with store.lent(dtype) as weight:
                out.addmm_(rows, weight.t())
        ctx.recipe, inputs = kept(x)
        ctx.save_for_backward(low, keep, *factors, *inputs)
        ctx.store, ctx.plan, ctx.count, ctx.shape = store, plan, len(factors), x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, keep, *saved = ctx.saved_tensors
        factors, inputs = saved[: ctx.count], saved[ctx.count :]
        As, Bs, plan = factors[::2], factors[1::2], ctx.plan
        need_x, need_bias, _, _, _, _, *need_factors = ctx.needs_input_grad
        dtype = low.dtype
        grad = cast(grad.reshape(-1, grad.shape[-1]), dtype)  # (N, out)
        dx = dbias = None
        dAs: list[Any] = [None] * len(As)
        dBs: list[Any] = [None] * len(Bs)
        if need_x or any(need_factors[::2]):
            down = plan.times(grad, plan.stack_B(Bs, dtype))  # (N, r)
            if any(need_factors[::2]):
                fed = plan.drop(made_again(ctx.recipe, tuple(inputs)).reshape(-1, ctx.shape[-1]), keep)
                dAs = plan.sums(plan.outer(down, fed, As[0].dtype))
            if need_x:
                dx = plan.drop(plan.times(down, plan.stack_A(As, dtype)), keep)  # (N, in)
                with ctx.store.lent(dtype) as weight:
                    dx = dx.addmm_(grad, weight).view(ctx.shape)
        if any(need_factors[1::2]):
            dBs = plan.sums(plan.scale_(plan.outer(grad, low, Bs[0].dtype), plan.owners))
        dfactors: list[Any] = [None] * ctx.count
        for i, (dA, dB) in enumerate(zip(dAs, dBs, strict=True)):
            r = len(As[i])  # the rest is padding
            if dA is not None and need_factors[2 * i]:
                dfactors[2 * i] = dA if r == plan.rank else dA[:r]
            if dB is not None and need_factors[2 * i + 1]:
                dfactors[2 * i + 1] = dB if r == plan.rank else dB[:, :r]
        if need_bias:
            dbias = bias_gradient(grad, ctx.bias_dtype)
        return dx, dbias, None, None, None, None, *dfactors


def _one_product(rows: Tensor, weight: Tensor, low: Tensor, plan: _Plan, Bs: Sequence[Tensor], bias: Tensor) -> Tensor:
    """rows W^T + bias + each run's low B^T as one product over concatenated factors, rounded once.

    A bias in half precision would swallow the small products before the large one is added. Each update has columns of
    its own, which are zero in the rows of the others.
    """
    r = plan.rank
    spread = low.new_zeros(low.shape[0], r * len(Bs))
    for wide, piece, owner in zip(spread.split(plan.lengths), low.split(plan.lengths), plan.owners, strict=True):
        if owner is not None:
            wide[:, owner * r : (owner + 1) * r] = piece
    return F.linear(torch.cat([rows, spread], 1), torch.cat([weight, plan.beside_B(Bs, rows.dtype)], 1), bias)
