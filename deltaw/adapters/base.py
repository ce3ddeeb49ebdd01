"""The adapter contract: one method's parameters on one layer.

An adapter is a view: its tensors live on the host layer, in dictionaries keyed by adapter name, under the
attribute paths PEFT uses (``lora_A["default"].weight``), so that parameter names, optimizers and files agree
with PEFT's. A method is one file with its config and its adapter class, and one line in ``registry.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deltaw.adapters.config import PeftConfig
    from deltaw.adapters.host import HostLayer
    from deltaw.weights import WeightStore

__all__ = ["Adapter", "drawing", "settle"]


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
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> Self:
        """Makes the parameters on ``host`` (see :func:`drawing` and :func:`settle`) and returns the view.

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
        """``weight``, of any floating dtype, with this adapter folded in, in float32 or wider: W + ΔW (LoRA paper,
        section 4.1). ``weight`` itself is left as it is."""
        delta = self.delta_weight()
        if delta.requires_grad or delta.dtype != torch.promote_types(delta.dtype, weight.dtype):
            return weight + delta
        # in the memory of ΔW, which is this call's own: over a whole model new memory costs more than the sum
        return delta.add_(weight)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        """float32 bias with this adapter folded in; unchanged unless the method trains a bias of its own."""
        return bias

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name on the host without the adapter's name, parameter), e.g. ``("lora_A.weight", ...)``."""
        for slot in self.parameter_slots:
            held: Any = getattr(self.host, slot, {})  # an empty one went with the last adapter that was taken away
            if self.name not in held:
                continue
            entry = held[self.name]
            if isinstance(entry, nn.Module):
                for key, parameter in entry.named_parameters():
                    yield f"{slot}.{key}", parameter
            else:  # a parameter, or the plain tensor that torch.func puts in its place
                yield slot, entry

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    # --- files ----------------------------------------------------------------------------------------------

    def places(self) -> Mapping[str, Tensor]:
        """Name in PEFT's file, after the layer's own -> the parameter (or buffer) that it fills."""
        return dict(self.named_parameters())

    def file_tensors(self) -> dict[str, Tensor]:
        """What is written: name in PEFT's file, after the layer's own -> tensor; :meth:`places` unless the file holds
        another form."""
        return {name: parameter.detach() for name, parameter in self.places().items()}

    def unconverted_tensors(self) -> dict[str, Tensor]:
        """What is written with ``convert_to_lora=False``: another form than :meth:`file_tensors` where a method has
        two."""
        return self.file_tensors()

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors of a file, brought into the form of :meth:`places`; unchanged where the file has it."""
        return tensors

    @classmethod
    def file_config(cls, config: PeftConfig, adapters: Mapping[str, Adapter]) -> PeftConfig:
        """The config that belongs to :meth:`file_tensors`.

        Args:
            adapters: layer name -> adapter, of one adapter name.
        """
        return config

    @classmethod
    def unconverted_config(cls, config: PeftConfig, adapters: Mapping[str, Adapter]) -> PeftConfig:
        """The config that belongs to :meth:`unconverted_tensors`."""
        return cls.file_config(config, adapters)

    # --- training the whole model ---------------------------------------------------------------------------

    #: whether any of the hooks below does anything
    steers: ClassVar[bool] = False

    @classmethod  # noqa: B027 (most methods have nothing to do here)
    def before_training(cls, config: PeftConfig, adapters: Mapping[str, Adapter], total_steps: int) -> None:
        """Called by a trainer before the first step.

        Args:
            adapters: layer name -> adapter, of one adapter name.
            total_steps: optimizer steps that the run will make.
        """

    @classmethod
    def penalty(cls, config: PeftConfig, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """A scalar to add to the training loss, over all layers of one adapter name; None where there is none."""
        return None

    @classmethod  # noqa: B027 (most methods have nothing to do here)
    def after_step(cls, config: PeftConfig, adapters: Mapping[str, Adapter], step: int) -> None:
        """Called after each optimizer step, while gradients are still there.

        Args:
            step: optimizer steps made so far, with the one that was just made.
        """

    def training_state(self) -> dict[str, Tensor]:
        """What a run needs beyond the adapter's files to go on as if it had not stopped: name -> tensor."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Takes back what :meth:`training_state` gave, after the files were loaded."""

    @classmethod  # noqa: B027
    def resume(cls, config: PeftConfig, adapters: Mapping[str, Adapter], saved: PeftConfig) -> None:
        """Called before the tensors of a checkpoint are loaded into adapters that train here.

        Args:
            saved: the config in the checkpoint.
        """

    # --- taking it away -------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Takes this adapter's parameters off the host, and the dictionaries that are empty then."""
        for slot in (*self.parameter_slots, *self.value_slots):
            held: Any = getattr(self.host, slot, None)
            if held is not None and self.name in held:
                del held[self.name]
            if held is not None and not len(held):
                delattr(self.host, slot)


# --- making parameters ------------------------------------------------------------------------------------------

Settled = TypeVar("Settled", nn.Module, Tensor)


@contextmanager
def drawing(host: HostLayer) -> Iterator[None]:
    """Inside the block new tensors are drawn in float32 on the CPU, so that a seed means the same everywhere; on the
    meta device where the caller has set it, because a file is to fill the tensors."""
    meta = "meta" in (torch.get_default_device().type, host.store.device.type)
    with torch.device("meta" if meta else "cpu"):
        yield


def settle(host: HostLayer, drawn: Settled) -> Settled:
    """What was drawn, on the base's device as a float32 master (float64 over a float64 base).

    The draw passes through the base's dtype on the way, as PEFT's does: same seed, same adapter.
    """
    dtype = host.store.dtype
    device = drawn.device if isinstance(drawn, Tensor) else next(drawn.parameters()).device
    if device.type != "meta":
        device = host.store.device
    return drawn.to(dtype).to(device, torch.promote_types(dtype, torch.float32))
