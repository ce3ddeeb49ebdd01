"""How AdaLoRA hands out ranks: a budget that falls while a run goes on, and the triplets that are worth keeping.

Triplet i of a layer is row i of A, entry i of E and column i of B (Zhang et al. 2023, arXiv 2303.10512). Works on
tensors; knows nothing of layers, configs and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.weights import wide

__all__ = ["Importance", "Schedule", "most_important", "triplet_scores"]


class Schedule(NamedTuple):
    """The budget over a run, in triplets of all layers together (section 3.3).

    Attributes:
        initial: triplets that the layers have.
        target: triplets that are to be left.
        begin: last step with the whole budget.
        end: first step with the final one.
        every: steps from one allocation to the next.
    """

    initial: int
    target: int
    begin: int
    end: int
    every: int

    def budget(self, step: int) -> int:
        """Triplets that may stay after ``step``: a cubic fall from ``initial`` to ``target``."""
        if step <= self.begin:
            return self.initial
        if step >= self.end:
            return self.target
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return int((self.initial - self.target) * left**3 + self.target)

    def due(self, step: int) -> bool:
        """Whether ranks are handed out anew after ``step``; the last time is at ``end``."""
        return (self.begin < step < self.end and step % self.every == 0) or step == self.end


class Importance:
    """How much each element of one parameter matters to the loss, smoothed over steps (section 3.2).

    Attributes:
        sensitivity: running mean of abs(p * grad): the change of the loss if the element were zero.
        uncertainty: running mean of how far a step's sensitivity was from that mean.
    """

    def __init__(self, sensitivity: Tensor, uncertainty: Tensor) -> None:
        self.sensitivity = sensitivity
        self.uncertainty = uncertainty

    @classmethod
    def none_yet(cls, parameter: Tensor) -> Importance:
        like = wide(parameter.detach())
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    @torch.no_grad()
    def update(self, parameter: Tensor, grad: Tensor | None, beta1: float, beta2: float) -> None:
        """Takes in one step; no gradient means that the parameter took no part in it."""
        now = torch.zeros_like(self.sensitivity) if grad is None else (wide(parameter) * grad).abs_()
        self.sensitivity.mul_(beta1).add_(now, alpha=1 - beta1)
        self.uncertainty.mul_(beta2).add_(now.sub_(self.sensitivity).abs_(), alpha=1 - beta2)

    def score(self) -> Tensor:
        return self.sensitivity * self.uncertainty


def triplet_scores(A: Tensor, B: Tensor, E: Tensor) -> Tensor:
    """Scores of the elements of A (r, in), B (out, r) and E (r, 1) -> one score a triplet (r,): that of the singular
    value, plus the means of its vectors."""
    return E.view(-1) + (A.mean(1) + B.mean(0))


def most_important(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """One mask (r,) a layer, True for the ``budget`` best triplets of all layers; what ties with the best of those that
    go, goes too."""
    everyone = torch.cat([score.to(scores[0].device) for score in scores])
    going = everyone.numel() - budget
    if going <= 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    threshold = torch.kthvalue(everyone, going).values
    return [score > threshold.to(score.device) for score in scores]
