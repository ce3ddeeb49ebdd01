"""DoRA: W' = m (W + s B A) / ||W + s B A||, row by row (Liu et al. 2024, arXiv 2402.09353, equation 5).

The direction of each output is LoRA's, its magnitude m a parameter of its own, which starts as the norm of the row. The
norm is a constant in backward (section 4.3), and W + s B A is not built for it. :class:`Scaled` is what DoRA adds to
LoRA on any kind of layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from deltaw.adapters.base import Adapter
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.memo import Memo
from deltaw.adapters.methods.lora import Lora, require_bare
from deltaw.ops import gain, rescale, row_norms, row_squares
from deltaw.weights import WeightStore, wide

__all__ = ["Dora", "Magnitude", "Scaled"]

SLOT = "lora_magnitude_vector"


class Magnitude(nn.Module):
    """Holds m under the name it has in PEFT's models."""

    def __init__(self, magnitude: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude)


class Scaled(Adapter):
    """The magnitudes of one layer's outputs, on top of a LoRA adapter, which is the next class in the order of
    resolution."""

    def __init__(self, host: HostLayer, name: str) -> None:
        super().__init__(host, name)
        self._norm = Memo()

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> Self:
        require_bare(host, f"use_dora=True on {layer_name!r}")
        adapter = super().create(host, name, config, layer_name)
        held = host.slot(SLOT, nn.ModuleDict)
        if any(place.is_meta for place in adapter.places().values()):
            dtype = torch.promote_types(host.store.dtype, torch.float32)
            norm = torch.empty(adapter.outputs(), dtype=dtype, device="meta")
        else:
            norm = adapter._constant(adapter.compute_norm)
        # not rounded to the base's dtype, as PEFT's is: a layer would begin up to 0.4% off its base
        held[name] = Magnitude(norm)
        return adapter

    @property
    def magnitude(self) -> nn.Parameter:
        return getattr(self.host, SLOT)[self.name].weight

    def places(self) -> dict[str, Tensor]:
        return {name.replace(f"{SLOT}.weight", SLOT): place for name, place in super().places().items()}

    # --- the norm -------------------------------------------------------------------------------------------

    @abstractmethod
    def outputs(self) -> tuple[int, ...]:
        """The shape of m."""

    @abstractmethod
    def compute_norm(self) -> Tensor:
        """||W + ΔW|| of each output, in float32 or wider, in the shape of m."""

    @abstractmethod
    def squares(self) -> Tensor:
        """||W||^2 of each output, as :func:`row_squares` gives it."""

    def base_squares(self) -> Tensor:
        """:meth:`squares`, kept on the host for as long as the base weight stays what it is."""
        if torch.compiler.is_compiling():
            return self.squares()
        memo: Memo = vars(self.host).setdefault("base_squares", Memo())
        return memo.get(self.host.store.stored(), self.squares)

    def norm(self) -> Tensor:
        """||W + ΔW|| of each output now, a constant to autograd.

        It is computed in each forward that trains this adapter, and otherwise when something has changed; in compiled
        code each time, so merge before generating there.
        """
        if torch.compiler.is_compiling():
            return self.compute_norm().detach()
        if torch.is_grad_enabled() and self.magnitude.requires_grad:
            self._norm.forget()
            return self._constant(self.compute_norm)
        sources = [
            *self.host.store.stored(),
            *(place for place in super().places().values() if place is not self.magnitude),
        ]
        return self._norm.get(sources, lambda: self._constant(self.compute_norm))

    def _constant(self, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()`` in the tensors' own precision, as a tensor that any later graph may use."""
        device = self.host.store.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            return compute()

    # --- ΔW -------------------------------------------------------------------------------------------------

    @abstractmethod
    def along_outputs(self, gain: Tensor) -> Tensor:
        """One number an output, in m's shape -> shaped to multiply the base weight."""

    def merged_weight(self, weight: Tensor) -> Tensor:
        """m / ||W + ΔW|| (weight + ΔW), with the norm over the base weight W alone, also where ``weight`` holds other
        adapters already; so does forward."""
        return self.along_outputs(gain(self.magnitude, self.norm())) * (weight + super().delta_weight())

    def delta_weight(self) -> Tensor:
        """All that changes: m / ||W + s B A|| (W + s B A) - W."""
        require_bare(self.host, f"the update of adapter {self.name!r}, which is DoRA's,")
        weight = wide(self.host.store.dequantize())
        return self.merged_weight(weight) - weight


class Dora(Scaled, Lora):
    """DoRA on one linear layer: A (r, in), B (out, r), m (out,).

    With dropout the base's part of the output is that of the full input; PEFT recomputes it from the dropped one, which
    costs a second product and makes the base noisy.
    """

    parameter_slots = (*Lora.parameter_slots, SLOT)

    def outputs(self) -> tuple[int, ...]:
        return self.host.store.shape[:1]

    def squares(self) -> Tensor:
        store = self.host.store
        with store.lent(store.dtype) as weight:
            return row_squares(weight.detach())

    def compute_norm(self) -> Tensor:
        f, store, squares = self.factors(), self.host.store, self.base_squares()
        with store.lent(store.dtype) as weight:
            return row_norms(squares, weight.detach(), f.A, f.B, f.scaling)

    def along_outputs(self, gain: Tensor) -> Tensor:
        return gain[:, None]

    def linear(self, x: Tensor, store: WeightStore, bias: Tensor | None) -> Tensor:
        return rescale(super().linear(x, store, bias), bias, self.magnitude, self.norm())

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        return rescale(super().forward(x, base_out), self.host.bias, self.magnitude, self.norm())
