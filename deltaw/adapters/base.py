"""The adapter contract: one method's parameters on one layer.

An adapter is a view: its tensors live on the host layer, in dictionaries keyed by adapter name, under the
attribute paths PEFT uses (``lora_A["default"].weight``), so that parameter names, optimizers and files agree
with PEFT's. A method is one file with its config and its adapter class, and one line in ``registry.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from deltaw.adapters.config import PeftConfig
    from deltaw.adapters.host import HostLayer
    from deltaw.weights import WeightStore

__all__ = ["Adapter"]


class Adapter(ABC):
    """One method's parameters on one host layer, under one adapter name."""

    #: attributes of the host that hold this method's parameters, each a ModuleDict or ParameterDict by
    #: adapter name
    parameter_slots: ClassVar[tuple[str, ...]] = ()
    #: attributes of the host that hold this method's plain values and dropouts, each a dict by adapter name
    value_slots: ClassVar[tuple[str, ...]] = ()
    #: PEFT's name for the family's prefix; ``base_model.prefix``
    prefix: ClassVar[str] = ""
    #: whether ΔW exists, so that the adapter can be folded into the base weight
    mergeable: ClassVar[bool] = True

    def __init__(self, host: HostLayer, name: str) -> None:
        self.host = host
        self.name = name

    @classmethod
    @abstractmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> Adapter:
        """Makes the parameters on ``host`` and returns the view.

        Args:
            layer_name: dotted name of the layer, for ``rank_pattern`` and for messages.
        """

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """ΔW in the base weight's own shape, accumulated in float32."""

    @abstractmethod
    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        """The adapted output, given the layer's input and the output so far."""

    def linear(self, x: Tensor, store: WeightStore, bias: Tensor | None) -> Tensor:
        """Base and adapter in one step, x (..., in) -> (..., out); overridden where one fused operation does
        both."""
        return self.forward(x, store.linear(x, bias))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """float32 weight with this adapter folded in: W + ΔW (LoRA paper, section 4.1)."""
        return weight + self.delta_weight()

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """float32 bias with this adapter folded in; unchanged unless the method trains a bias of its own."""
        return bias

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name on the host without the adapter's name, parameter), e.g. ``("lora_A.weight", ...)``."""
        for slot in self.parameter_slots:
            held: Any = getattr(self.host, slot)
            if self.name not in held:
                continue
            entry = held[self.name]
            if isinstance(entry, nn.Parameter):
                yield slot, entry
            else:
                for key, parameter in entry.named_parameters():
                    yield f"{slot}.{key}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def remove(self) -> None:
        """Takes this adapter's parameters off the host."""
        for slot in (*self.parameter_slots, *self.value_slots):
            held: Any = getattr(self.host, slot, {})
            if self.name in held:
                del held[self.name]
