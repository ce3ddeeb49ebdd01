"""What LoHa and LoKr have in common (LyCORIS, Yeh et al. 2023, arXiv 2309.14859): a few small tensors from which ΔW is
made, rows of ΔW that are dropped in training, and the convolution.

Knows nothing of how either makes its ΔW.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from deltaw.adapters.base import Adapter, drawing, settle
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.hosts.conv import Conv
from deltaw.adapters.targeted import TargetedConfig
from deltaw.errors import ConfigError
from deltaw.ops.delta import remade
from deltaw.weights import wide

__all__ = ["Lycoris", "LycorisConfig", "LycorisConv", "Shapes"]

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass
class LycorisConfig(TargetedConfig):
    """Fields of LoHa and LoKr, under PEFT's names; those that choose layers are :class:`TargetedConfig`'s.

    Args:
        r: rank of each of the small products.
        alpha: the update is scaled by ``alpha / r``.
        rank_dropout: probability of dropping a row of ΔW (one output of the layer) in training.
        module_dropout: probability of leaving a layer's adapter out of a training step.
        use_effective_conv2d: give a convolution's kernel a factor of its own (FedPara, arXiv 2108.06098,
            proposition 3), for kernels larger than one point.
    """

    r: int = 8
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False

    def faults(self) -> list[str]:
        return super().faults() + self._probability("rank_dropout", "module_dropout")


class Lycoris(Adapter):
    """An adapter whose ΔW is s times a function of a few small parameters."""

    value_slots = ("r", "alpha", "scaling", "rank_dropout", "rank_dropout_scale", "module_dropout")
    #: whether the rows that are kept are scaled up for those that are dropped
    rescales: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def shapes(cls, host: HostLayer, config: Any, r: int) -> Shapes:
        """Slot -> shape of its parameter, in the order in which they are drawn."""

    @classmethod
    @abstractmethod
    def zeros(cls, config: Any) -> Collection[str]:
        """The slots whose parameters start at zero."""

    @staticmethod
    @abstractmethod
    def product(**parameters: Tensor) -> Tensor:
        """ΔW / s from the parameters, by slot; differentiable, and of ΔW's elements in ΔW's order."""

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> Self:
        assert isinstance(config, LycorisConfig)
        cls.check(host, layer_name)
        r, alpha = config.rank_for(layer_name), config.alpha_for(layer_name)
        values: dict[str, Any] = {
            "r": r,
            "alpha": alpha,
            "scaling": alpha / r,
            "rank_dropout": config.rank_dropout,
            "rank_dropout_scale": getattr(config, "rank_dropout_scale", cls.rescales),
            "module_dropout": config.module_dropout,
        }
        for slot, value in values.items():
            host.slot(slot, dict)[name] = value
        held = {slot: host.slot(slot, nn.ParameterDict) for slot in cls.parameter_slots}
        zeros = cls.zeros(config)
        for slot, shape in cls.shapes(host, config, r).items():
            with drawing(host):
                drawn = torch.zeros(shape, dtype=torch.float32)
                if slot not in zeros:
                    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            held[slot][name] = nn.Parameter(settle(host, drawn))
        return cls(host, name)

    @classmethod
    def check(cls, host: HostLayer, layer_name: str) -> None:
        """
        Raises:
            ConfigError: the method cannot adapt this layer.
        """

    # --- what it holds --------------------------------------------------------------------------------------

    @property
    def held(self) -> dict[str, Tensor]:
        """Slot -> parameter, of those that this layer has."""
        slots = {slot: getattr(self.host, slot, {}) for slot in self.parameter_slots}
        return {slot: entries[self.name] for slot, entries in slots.items() if self.name in entries}

    def value(self, slot: str) -> Any:
        return getattr(self.host, slot)[self.name]

    @property
    def scaling(self) -> float:
        return self.value("scaling")

    # --- dropout --------------------------------------------------------------------------------------------

    def left_out(self) -> bool:
        """Draws whether ``module_dropout`` leaves this adapter out of this forward; under a compiler, where a draw
        cannot decide what is computed, :meth:`row_scale` does it."""
        p = self.value("module_dropout")
        return self.host.training and p > 0 and not torch.compiler.is_compiling() and bool(torch.rand(()) < p)

    def row_scale(self) -> Tensor | None:
        """Draws (out,): 0 for a row of ΔW that is dropped now, else 1, or what makes up for the dropped ones; None
        where nothing is dropped."""
        if not self.host.training:
            return None
        out, device = self.host.store.shape[0], self.host.store.device
        scale = None
        if self.value("rank_dropout") > 0:
            scale = (torch.rand(out, device=device) >= self.value("rank_dropout")).float()
            if self.value("rank_dropout_scale"):
                scale = scale / scale.mean().clamp_min(1 / out)  # with every row dropped: zeros, not 0 / 0
        if self.value("module_dropout") > 0 and torch.compiler.is_compiling():
            gate = (torch.rand((), device=device) >= self.value("module_dropout")).float()
            scale = gate.expand(out) if scale is None else scale * gate
        return scale

    # --- ΔW -------------------------------------------------------------------------------------------------

    def maker(self, row_scale: Tensor | None = None) -> Callable[..., Tensor]:
        """The function from the values of :attr:`held` to ΔW in float32 or wider, in the base weight's shape."""
        shape, slots, scaling, product = self.host.store.shape, tuple(self.held), self.scaling, self.product

        def make(*parameters: Tensor) -> Tensor:
            delta = product(**dict(zip(slots, map(wide, parameters), strict=True))).reshape(shape) * scaling
            return delta if row_scale is None else delta * row_scale.view(-1, *[1] * (len(shape) - 1)).to(delta.dtype)

        return make

    def delta_weight(self) -> Tensor:
        return self.maker()(*self.held.values())


class LycorisConv(Lycoris):
    """On a convolution: one more convolution, with ΔW. Groups are the base's, so ΔW has the base weight's shape."""

    host: Conv

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        if self.left_out():
            return base_out
        delta = remade(self.maker(self.row_scale()), *self.held.values())
        return base_out + self.host.convolve(x, delta).to(base_out.dtype)

    @classmethod
    def check(cls, host: HostLayer, layer_name: str) -> None:
        assert isinstance(host, Conv)
        if host.dimensions > 2:
            raise ConfigError(
                f"{cls.__name__.removesuffix('Conv')} does not support {type(host.base_layer).__name__} "
                f"({layer_name!r}): it adapts Conv1d and Conv2d; leave the layer out with exclude_modules, or use LoRA"
            )
