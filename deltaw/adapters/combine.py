"""LoRA adapters of one layer combined into one: PEFT's eleven combination types, as a registry.

A combination takes the adapters at a level (their factors, or their updates ΔW), makes each tensor sparse and merges
the tensors into one. Knows nothing of models and configs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.adapters.base import Adapter
from deltaw.adapters.lowrank import LowRank
from deltaw.weights import TransposedStore, wide

__all__ = ["COMBINATIONS", "MAJORITIES", "Combination", "Request", "Source"]

MAJORITIES = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of ``add_weighted_adapter``, under PEFT's names."""

    adapter_name: str
    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    @property
    def combination(self) -> Combination:
        """The combination asked for. One adapter alone is taken as it is, unless another rank is asked for."""
        alone = len(self.adapters) == 1 and self.svd_rank is None
        return COMBINATIONS["linear" if alone else self.combination_type]


class Source(NamedTuple):
    """One adapter of one layer, with its weight: A (r, in), B (out, r); of convolutions A (r, in, *kernel) and
    B (out, r / groups, 1...)."""

    adapter: Adapter
    A: Tensor
    B: Tensor
    #: the weight asked for
    weight: float
    #: the weight times the adapter's own scaling s; the new adapter's is 1
    scaled: float

    @classmethod
    def of(cls, adapter: Any, weight: float) -> Source:
        if isinstance(adapter, LowRank):
            A, B, scaling, *_ = adapter.factors()
        else:  # embeddings hold parameters, convolutions layers
            A, B = (getattr(side, "weight", side) for side in (adapter.lora_A, adapter.lora_B))
            scaling = adapter.scaling
        return cls(adapter, A.detach(), B.detach(), weight, weight * scaling)

    @property
    def groups(self) -> int:
        return self.A.shape[0] // self.B.shape[1]


# --- merging: k tensors of one shape, stacked (k, ...), with k weights -> one tensor ------------------------------


def add(tensors: Tensor, weights: Tensor, request: Request) -> Tensor:
    """The weighted sum: task arithmetic (Ilharco et al. 2022, arXiv 2212.04089)."""
    return (tensors * _spread(weights, tensors)).sum(dim=0)


def elect(tensors: Tensor, weights: Tensor, request: Request) -> Tensor:
    """The weighted mean of those elements whose sign is the majority's: TIES (Yadav et al. 2023, arXiv 2306.01708,
    section 3). The majority is that of the elements' sum (``"total"``) or of their number (``"frequency"``)."""
    signs = tensors.sign()
    votes = (tensors if request.majority_sign_method == "total" else signs).sum(dim=0)
    agree = signs == torch.where(votes >= 0, 1, -1)
    return (tensors * _spread(weights, tensors) * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1.0)


def _spread(weights: Tensor, tensors: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (tensors.dim() - 1))


# --- making one tensor sparse -------------------------------------------------------------------------------------


def whole(tensor: Tensor, density: float) -> Tensor:
    return tensor


def trim(tensor: Tensor, density: float) -> Tensor:
    """Keeps the share ``density`` of the elements, the largest ones (TIES)."""
    if density == 1:
        return tensor
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return tensor * torch.zeros_like(tensor).flatten().index_fill(0, largest, 1).view_as(tensor)


def drop(tensor: Tensor, density: float) -> Tensor:
    """Keeps each element with probability ``density`` and scales it up, so that the mean stays: DARE (Yu et al. 2023,
    arXiv 2311.03099)."""
    if density == 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


# --- levels: the sources of one layer -> the new A and B, of rank r at most ---------------------------------------


def stack(sources: Sequence[Source], r: int, request: Request) -> tuple[Tensor, Tensor]:
    """[w1 s1 A1; w2 s2 A2; ...] and [B1, B2, ...]: exactly the weighted sum of the updates; ranks add up."""
    groups = sources[0].groups  # of a convolution: each has rows of A of its own
    As = [(source.A * source.scaled).unflatten(0, (groups, -1)) for source in sources]
    return torch.cat(As, dim=1).flatten(0, 1), torch.cat([source.B for source in sources], dim=1)


def of_factors(sources: Sequence[Source], r: int, request: Request) -> tuple[Tensor, Tensor]:
    """Merges the A and the B each on their own, by the roots of the weights. Rough: a product of sums is not the sum of
    the products."""
    how, density = request.combination, request.density or 1.0
    roots = [math.sqrt(abs(source.scaled)) for source in sources]
    signed = [math.copysign(root, source.scaled) for root, source in zip(roots, sources, strict=True)]
    merged = []
    for side, weights in ((0, signed), (1, roots)):  # a negative weight turns A alone
        tensors = [how.sparsify((source.A, source.B)[side], density) for source in sources]
        merged.append(how.merge(torch.stack(tensors), torch.tensor(weights, device=tensors[0].device), request))
    return merged[0], merged[1]


def of_products(sources: Sequence[Source], r: int, request: Request) -> tuple[Tensor, Tensor]:
    """The best approximation of rank r to the weighted sum of the updates. The singular values are those of a small
    matrix, by QR decompositions of the stacked factors; ΔW is not built."""
    if request.svd_clamp is not None:  # where it cuts depends on the signs of the vectors: those of ΔW's, as in PEFT
        return of_updates(sources, r, request)
    A, B = (wide(factor).flatten(1) for factor in stack(sources, r, request))
    Q_B, R_B = torch.linalg.qr(B)  # (out, k) (k, R)
    Q_A, R_A = torch.linalg.qr(A.T)  # (in, k) (k, R)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return _leading(Q_B @ U, S, Vh @ Q_A.T, sources[0], r, request)


def of_updates(sources: Sequence[Source], r: int, request: Request) -> tuple[Tensor, Tensor]:
    """Merges the updates ΔW and takes the best approximation of rank r to the result."""
    how, host = request.combination, sources[0].adapter.host
    turned = isinstance(host.store, TransposedStore)
    updates = [wide(source.adapter.delta_weight().detach()) for source in sources]
    # draws run over the weight as it lies in memory, as PEFT's do
    updates = [how.sparsify(update.T.contiguous() if turned else update, request.density or 1.0) for update in updates]
    weights = torch.tensor([float(source.weight) for source in sources], device=updates[0].device)
    merged = how.merge(torch.stack(updates), weights, request).flatten(1)
    if turned or host.kind == "embedding":  # an embedding's update is (V, d), its B (d, r)
        merged = merged.T
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False, driver=request.svd_driver)
    return _leading(U, S, Vh, sources[0], r, request)


def _leading(U: Tensor, S: Tensor, Vh: Tensor, like: Source, r: int, request: Request) -> tuple[Tensor, Tensor]:
    """The r leading singular vectors as A and B, in the dimensions of ``like``."""
    U, Vh = U[:, :r] * S[:r], Vh[:r]
    if request.svd_clamp is not None:
        most = torch.quantile(torch.cat([U.flatten(), Vh.flatten()]), request.svd_clamp)
        U, Vh = U.clamp(-most, most), Vh.clamp(-most, most)
    return Vh.unflatten(1, like.A.shape[1:]), U.unflatten(1, (-1, *like.B.shape[2:]))


# --- the eleven ---------------------------------------------------------------------------------------------------


class Combination(NamedTuple):
    """How the sources of one layer become one adapter."""

    level: Callable[[Sequence[Source], int, Request], tuple[Tensor, Tensor]]
    sparsify: Callable[[Tensor, float], Tensor] = whole
    merge: Callable[[Tensor, Tensor, Request], Tensor] = add

    @property
    def prunes(self) -> bool:
        """Whether ``density`` says something."""
        return self.sparsify is not whole

    @property
    def stacks(self) -> bool:
        """Whether the ranks add up."""
        return self.level is stack

    @property
    def decomposes(self) -> bool:
        """Whether the new rank may be chosen."""
        return self.level in (of_products, of_updates)


COMBINATIONS: dict[str, Combination] = {
    "svd": Combination(of_products),
    "linear": Combination(of_factors),
    "cat": Combination(stack),
    "ties": Combination(of_factors, trim, elect),
    "ties_svd": Combination(of_updates, trim, elect),
    "dare_ties": Combination(of_factors, drop, elect),
    "dare_linear": Combination(of_factors, drop, add),
    "dare_ties_svd": Combination(of_updates, drop, elect),
    "dare_linear_svd": Combination(of_updates, drop, add),
    "magnitude_prune": Combination(of_factors, trim, add),
    "magnitude_prune_svd": Combination(of_updates, trim, add),
}
