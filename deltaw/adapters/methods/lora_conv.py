"""LoRA on a convolution: A is a convolution in -> r with the base's kernel, B one r -> out with a kernel of 1.

ΔW = s B A over the channels, at each place of the kernel. With groups, B has the base's groups and A spans all input
channels (PEFT's layout): such an update does not fit the base's weight, so it trains but does not merge.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapters.base import Adapter, drawing, settle
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.hosts.conv import CONVOLUTIONS, Conv, Convolution
from deltaw.adapters.methods.lora import LoraConfig, rate, remember_settings
from deltaw.errors import ConfigError, MergeError
from deltaw.weights import wide

__all__ = ["LoraConv"]


class LoraConv(Adapter):
    """The low-rank update of one convolution: A (r, in, *kernel), B (out, r / groups, 1...)."""

    host: Conv
    parameter_slots = ("lora_A", "lora_B")
    value_slots = ("lora_dropout", "r", "lora_alpha", "scaling", "use_rslora", "lora_bias")
    prefix = "lora_"

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> LoraConv:
        assert isinstance(config, LoraConfig)
        assert isinstance(host, Conv)
        base, r = host.base_layer, config.rank_for(layer_name)
        faults = []
        if config.lora_bias and host.bias is None:
            faults.append(f"lora_bias=True, but {layer_name!r} has no bias to merge into; leave lora_bias out")
        if r % base.groups:
            faults.append(f"r={r}, but {layer_name!r} has {base.groups} groups; use a rank that they divide")
        if config.init_lora_weights not in (True, False, "gaussian"):
            faults.append(
                f"init_lora_weights={config.init_lora_weights!r}, which {layer_name!r}, a convolution, does not "
                "support; use True, False or 'gaussian', or target other layers"
            )
        if faults:
            raise ConfigError("; ".join(faults))
        remember_settings(host, name, config, layer_name)
        layer = CONVOLUTIONS[host.dimensions]
        with drawing(host):
            A = layer(
                base.in_channels,
                r,
                base.kernel_size,  # type: ignore[arg-type]
                base.stride,  # type: ignore[arg-type]
                base.padding,  # type: ignore[arg-type]
                base.dilation,  # type: ignore[arg-type]
                bias=False,
                padding_mode=base.padding_mode,
                dtype=torch.float32,
            )
            B = layer(r, base.out_channels, 1, groups=base.groups, bias=config.lora_bias, dtype=torch.float32)
        if config.init_lora_weights:
            if config.init_lora_weights == "gaussian":
                nn.init.normal_(A.weight, std=1 / r)
            else:
                nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
            for parameter in B.parameters():
                nn.init.zeros_(parameter)
        host.slot("lora_A", nn.ModuleDict)[name] = settle(host, A)
        host.slot("lora_B", nn.ModuleDict)[name] = settle(host, B)
        return cls(host, name)

    @property
    def lora_A(self) -> Convolution:
        return self.host.lora_A[self.name]  # type: ignore[index, return-value]

    @property
    def lora_B(self) -> Convolution:
        return self.host.lora_B[self.name]  # type: ignore[index, return-value]

    @property
    def scaling(self) -> float:
        return self.host.scaling[self.name]  # type: ignore[index]

    @property
    def dropout(self) -> float:
        return rate(self.host.lora_dropout[self.name])  # type: ignore[index]

    def delta_weight(self) -> Tensor:
        """s B A, (out, in, *kernel).

        Raises:
            MergeError: the base has groups.
        """
        if self.host.groups > 1:
            raise MergeError(
                f"adapter {self.name!r} cannot be merged into a convolution with {self.host.groups} groups: its "
                "update mixes all input channels, the base's weight holds those of one group; keep it beside the base"
            )
        A, B = wide(self.lora_A.weight), wide(self.lora_B.weight)
        return (B.flatten(1) @ A.flatten(1)).view(self.host.store.shape) * self.scaling  # (out, r) @ (r, in * kernel)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        own = self.lora_B.bias
        return bias if own is None or bias is None else bias + wide(own) * self.scaling

    def update(self, x: Tensor) -> Tensor:
        """What is added to the base's output, x (N, in, *size) -> (N, out, *size') in float32 or wider."""
        A, B = self.lora_A, self.lora_B
        x = F.dropout(x, self.dropout) if self.dropout else x
        # the small A is cast, not the large x; the r channels between are summed up in B's own precision
        low = A._conv_forward(x, A.weight.to(x.dtype), None)
        return B(low.to(B.weight.dtype)) * self.scaling

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        return (base_out + self.update(x)).to(base_out.dtype)
