"""LoHa: ΔW = s (w1_a w1_b) ∘ (w2_a w2_b), the elementwise product of two low-rank products (FedPara, Hyeon-Woo et al.
2021, arXiv 2108.06098, proposition 1; LyCORIS, arXiv 2309.14859), of rank up to r^2; s = alpha / r.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.adapters.config import PeftType
from deltaw.adapters.host import HostLayer
from deltaw.adapters.lowrank import Factors, LowRank
from deltaw.adapters.methods.lycoris import Lycoris, LycorisConfig, LycorisConv, Shapes
from deltaw.ops import lowrank_linear
from deltaw.ops.delta import delta_linear, remade
from deltaw.weights import WeightStore, wide

__all__ = ["LoHa", "LoHaConfig", "LoHaConv"]


@dataclasses.dataclass
class LoHaConfig(LycorisConfig):
    """Configuration of LoHa, with PEFT's fields.

    Args:
        init_weights: True (Kaiming, and w2_b zero), False (all random, for tests).
    """

    init_weights: bool = True

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LOHA
        super().__post_init__()


class Hadamard(Lycoris):
    """What LoHa is on every kind of layer: its slots, and how it starts."""

    parameter_slots = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    prefix = "hada_"

    @classmethod
    def zeros(cls, config: Any) -> Collection[str]:
        return ("hada_w2_b",) if config.init_weights else ()

    @staticmethod
    def product(**parameters: Tensor) -> Tensor:
        p = parameters
        if "hada_t1" not in p:
            return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
        # (out, in, kernel): each product has a core t (r, r, kernel) between its factors
        tucker = "ijkl,jr,ip->prkl"
        return torch.einsum(tucker, p["hada_t1"], p["hada_w1_b"], p["hada_w1_a"]) * torch.einsum(
            tucker, p["hada_t2"], p["hada_w2_b"], p["hada_w2_a"]
        )


class LoHa(Hadamard, LowRank):
    """On a linear layer. An elementwise product of two products of rank r is one product of rank r^2, over the products
    of all pairs of columns and of rows (Khatri-Rao), so ΔW need not be built where r^2 is small.
    """

    @classmethod
    def shapes(cls, host: HostLayer, config: Any, r: int) -> Shapes:
        out, width = host.store.shape
        return {"hada_w1_a": (out, r), "hada_w1_b": (r, width), "hada_w2_a": (out, r), "hada_w2_b": (r, width)}

    @property
    def plain(self) -> bool:
        return True

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias  # without making factors to see that they have none

    def factors(self) -> Factors:
        return self._factors(0.0 if self.left_out() else self.scaling)

    def _factors(self, scaling: float) -> Factors:
        w1_a, w1_b, w2_a, w2_b = map(wide, self.held.values())
        A = (w1_b[:, None] * w2_b[None]).flatten(0, 1)  # (r^2, in)
        B = (w1_a[:, :, None] * w2_a[:, None]).flatten(1)  # (out, r^2)
        scale = self.row_scale()
        return Factors(A, B if scale is None else B * scale[:, None].to(B.dtype), scaling)

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        if self.left_out():
            return base_out
        if not self._builds(x):
            f = self._factors(self.scaling)
            low = F.linear(x, f.A.to(x.dtype))  # (..., r^2)
            update = F.linear(low, (f.B * f.scaling).to(x.dtype))
        else:
            update = F.linear(x, remade(self.maker(self.row_scale()), *self.held.values()).to(x.dtype))
        return base_out + update.to(base_out.dtype)

    def linear(self, x: Tensor, store: WeightStore, bias: Tensor | None) -> Tensor:
        if self.left_out():
            return store.linear(x, bias)
        if self._builds(x):
            return delta_linear(x, store, bias, self.maker(self.row_scale()), *self.held.values())
        f = self._factors(self.scaling)
        return lowrank_linear(x, store, bias, f.A, f.B, f.scaling)

    def _builds(self, x: Tensor) -> bool:
        """Whether building ΔW takes fewer multiply-adds than the product of rank r^2, forward and backward."""
        if torch.compiler.is_compiling():
            return False  # a number of rows that the compiler keeps open must not decide
        out, width = self.host.store.shape
        rows, r = x.numel() // width, self.value("r")
        half = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type)
        # In float32 ΔW is folded into the base's products and its gradient is one more; in half precision there are
        # three more. It is made from two products of rank r, which are made again and differentiated in backward.
        products = 3 if half else 1
        return out * width * (rows * products + 8 * r) < 3 * rows * r * r * (out + width)


class LoHaConv(Hadamard, LycorisConv):
    """On Conv1d and Conv2d: two products over (out, in x kernel), or with ``use_effective_conv2d`` two with a core for
    the kernel (FedPara, proposition 3)."""

    @classmethod
    def shapes(cls, host: HostLayer, config: Any, r: int) -> Shapes:
        out, width, *kernel = host.store.shape
        points = math.prod(kernel)
        if not config.use_effective_conv2d or points == 1:
            width *= points
            return {"hada_w1_a": (out, r), "hada_w1_b": (r, width), "hada_w2_a": (out, r), "hada_w2_b": (r, width)}
        core = (r, r, *kernel, 1)[:4]  # a Conv1d's kernel is (k, 1), as in PEFT's files
        return {
            "hada_w1_a": (r, out),
            "hada_w1_b": (r, width),
            "hada_w2_a": (r, out),
            "hada_w2_b": (r, width),
            "hada_t1": core,
            "hada_t2": core,
        }
