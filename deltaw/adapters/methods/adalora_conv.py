"""AdaLoRA on a convolution: ΔW = s B (E * A), its rows laid out as kernels, A (r, in * kernel) (PEFT's form)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.hosts.conv import Conv
from deltaw.adapters.methods.adalora import AdaLora
from deltaw.errors import ConfigError

__all__ = ["AdaLoraConv"]


class AdaLoraConv(AdaLora):
    """The update of one convolution without groups: A (r, in * kernel), B (out, r), E (r, 1)."""

    host: Conv

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> AdaLora:
        """
        Raises:
            ConfigError: the convolution has groups.
        """
        assert isinstance(host, Conv)
        if host.groups > 1:
            raise ConfigError(
                f"AdaLoRA does not support {layer_name!r}, a convolution with {host.groups} groups; leave it out with "
                "exclude_modules, or use LoRA"
            )
        return super().create(host, name, config, layer_name)

    def delta_weight(self) -> Tensor:
        """(out, in, *kernel)"""
        return super().delta_weight().view(self.host.store.shape)

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout) if self.dropout else x
        return base_out + self.host.convolve(x, self.delta_weight()).to(base_out.dtype)
