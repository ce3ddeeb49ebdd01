"""LoKr: ΔW = s w1 ⊗ w2, a Kronecker product of a small matrix with another that may be of low rank (LyCORIS, Yeh et al.
2023, arXiv 2309.14859, section 3.3); s = alpha / r.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from deltaw.adapters.config import PeftType
from deltaw.adapters.host import HostLayer
from deltaw.adapters.methods.lycoris import Lycoris, LycorisConfig, LycorisConv, Shapes
from deltaw.errors import did_you_mean
from deltaw.ops.delta import remade
from deltaw.ops.kron import kron_linear, kron_product
from deltaw.weights import WeightStore

__all__ = ["LoKr", "LoKrConfig", "LoKrConv", "factorization"]


@dataclasses.dataclass
class LoKrConfig(LycorisConfig):
    """Configuration of LoKr, with PEFT's fields.

    Args:
        r: rank of w2, which is kept whole where r is at least half of its larger side.
        decompose_both: give w1 rank r too, where r is less than half of its larger side.
        decompose_factor: size of w1's sides, where it divides the layer's (the nearest divisor below otherwise); -1 for
            sides as near as possible to the square root.
        rank_dropout_scale: scale up the rows of ΔW that are kept, for those that ``rank_dropout`` drops.
        init_weights: True (Kaiming, and w1 zero), ``"lycoris"`` (Kaiming, and w2 zero), False (all random, for tests).
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOKR
        super().__post_init__()

    def faults(self) -> list[str]:
        faults = super().faults()
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            faults.append(
                f"decompose_factor={self.decompose_factor!r}: use a positive integer, or -1 for balanced factors"
            )
        if isinstance(self.init_weights, str) and self.init_weights != "lycoris":
            faults.append(
                f"init_weights={self.init_weights!r}: use True, False or 'lycoris'"
                f"{did_you_mean(self.init_weights, ['lycoris'])}"
            )
        return faults


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """(m, n) with m n = dimension: m = factor if that divides it, else the largest divisor that is neither above the
    square root nor above ``factor`` (-1: no such bound)."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    most = math.isqrt(dimension) if factor == -1 else min(math.isqrt(dimension), factor)
    m = next(d for d in range(most, 0, -1) if dimension % d == 0)
    return m, dimension // m


class Kronecker(Lycoris):
    """What LoKr is on every kind of layer: its slots, their shapes, and how it starts."""

    parameter_slots = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    prefix = "lokr_"

    @classmethod
    def shapes(cls, host: HostLayer, config: Any, r: int) -> Shapes:
        out, width, *kernel = host.store.shape
        l, k = factorization(out, config.decompose_factor)  # noqa: E741
        m, n = factorization(width, config.decompose_factor)
        shapes: Shapes = {}
        if config.decompose_both and r < max(l, m) / 2:
            shapes |= {"lokr_w1_a": (l, r), "lokr_w1_b": (r, m)}
        else:
            shapes["lokr_w1"] = (l, m)
        points = math.prod(kernel)
        if r >= max(k, n) / 2:
            shapes["lokr_w2"] = (k, n, *kernel)
        elif config.use_effective_conv2d and points > 1:
            core = (r, r, *kernel, 1)[:4]  # a Conv1d's kernel is (k, 1), as in PEFT's files
            shapes |= {"lokr_w2_a": (r, k), "lokr_w2_b": (r, n), "lokr_t2": core}
        else:
            shapes |= {"lokr_w2_a": (k, r), "lokr_w2_b": (r, n * points)}
        return shapes

    @classmethod
    def zeros(cls, config: Any) -> Collection[str]:
        if config.init_weights == "lycoris":
            return "lokr_w2", "lokr_w2_b"
        return ("lokr_w1", "lokr_w1_a") if config.init_weights else ()

    @staticmethod
    def product(**parameters: Tensor) -> Tensor:
        p = parameters
        w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        if "lokr_w2" in p:
            w2 = p["lokr_w2"]
        elif "lokr_t2" in p:
            w2 = torch.einsum("ijkl,ip,jr->prkl", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
        else:
            w2 = p["lokr_w2_a"] @ p["lokr_w2_b"]
        # On the whole w2 (k, n, kernel) of a Conv1d PEFT takes the product over the last two dimensions, not the first
        # two. Another order of the same numbers; kept, so that a file means the same here and there.
        return torch.einsum("lm,knx->klnmx" if w2.ndim == 3 else "lm,kn...->lkmn...", w1, w2)


class LoKr(Kronecker):
    """On a linear layer: the factors meet x one after the other, and ΔW is never built."""

    def linear(self, x: Tensor, store: WeightStore, bias: Tensor | None) -> Tensor:
        if self.left_out():
            return store.linear(x, bias)
        return kron_linear(x, store, bias, *self._matrices(), self.scaling, row_scale=self.row_scale())

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        if self.left_out():
            return base_out
        update = kron_product(x, *self._matrices(), self.scaling, row_scale=self.row_scale())
        return base_out + update.to(base_out.dtype)

    def _matrices(self) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """w1 (l, m), and w2 (k, n) or its factors ((k, r), (r, n))."""
        p = self.held
        w1 = p["lokr_w1"] if "lokr_w1" in p else remade(torch.matmul, p["lokr_w1_a"], p["lokr_w1_b"])
        return w1, p["lokr_w2"] if "lokr_w2" in p else (p["lokr_w2_a"], p["lokr_w2_b"])


class LoKrConv(Kronecker, LycorisConv):
    """On Conv1d and Conv2d: w2 spans the kernel, whole or of low rank; with ``use_effective_conv2d`` the kernel has a
    core of its own (FedPara, arXiv 2108.06098, proposition 3)."""
