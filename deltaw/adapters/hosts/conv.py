"""The host of convolutions in one, two and three dimensions. Knows nothing of any method."""

from __future__ import annotations

from torch import Tensor, nn

from deltaw.adapters.host import HostLayer

__all__ = ["CONVOLUTIONS", "Conv", "Convolution"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

#: dimensions of the kernel -> torch's layer
CONVOLUTIONS: dict[int, type[Convolution]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Conv(HostLayer):
    """Hosts adapters on a convolution, x (N, in, *size) -> (N, out, *size'), weight (out, in / groups, *kernel)."""

    kind = "conv"
    base_layer: Convolution

    @property
    def in_channels(self) -> int:
        return self.base_layer.in_channels

    @property
    def out_channels(self) -> int:
        return self.base_layer.out_channels

    @property
    def groups(self) -> int:
        return self.base_layer.groups

    @property
    def dimensions(self) -> int:
        """1, 2 or 3."""
        return len(self.base_layer.kernel_size)

    @classmethod
    def unfit(cls, module: nn.Module) -> str:
        if not any(type(module).forward is layer.forward for layer in CONVOLUTIONS.values()):
            return "its forward is not torch's own, and what it does besides a convolution is not known"
        return super().unfit(module)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """x convolved with another ``weight`` of the base's shape, without bias: the same stride, padding, padding
        mode, dilation and groups."""
        return self.base_layer._conv_forward(x, weight.to(x.dtype), None)
