"""DoRA on a convolution: a magnitude for each output channel.

``dora`` says what DoRA is; this file only says along what the norm is taken. Knows nothing of other layers.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.hosts.conv import Conv
from deltaw.adapters.methods.dora import SLOT, Scaled
from deltaw.adapters.methods.lora_conv import LoraConv
from deltaw.errors import ConfigError
from deltaw.ops import rescale, row_norms, row_squares

__all__ = ["DoraConv"]


class DoraConv(Scaled, LoraConv):
    """DoRA on one convolution: A (r, in, *kernel), B (out, r, 1...), m (1, out, 1...)."""

    parameter_slots = (*LoraConv.parameter_slots, SLOT)

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> Self:
        assert isinstance(host, Conv)
        if host.groups > 1:
            raise ConfigError(
                f"use_dora=True on {layer_name!r}, a convolution with {host.groups} groups: an update that spans all "
                "input channels has no place in its weight, so the weight's norm means nothing; exclude the layer"
            )
        return super().create(host, name, config, layer_name)

    def outputs(self) -> tuple[int, ...]:
        return 1, self.host.out_channels, *[1] * self.host.dimensions

    def squares(self) -> Tensor:
        return row_squares(self._rows())

    def compute_norm(self) -> Tensor:
        A, B = self.lora_A.weight.flatten(1), self.lora_B.weight.flatten(1)
        return row_norms(self.base_squares(), self._rows(), A, B, self.scaling).view(self.outputs())

    def _rows(self) -> Tensor:
        return self.host.store.dequantize().detach().flatten(1)  # (out, in * kernel)

    def along_outputs(self, gain: Tensor) -> Tensor:
        return gain.transpose(0, 1)  # W is (out, in, *kernel)

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        return rescale(super().forward(x, base_out), self.host.bias, self.magnitude, self.norm())
