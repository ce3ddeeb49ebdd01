"""The linear host: base and adapter in one fused step. Knows nothing of any method."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deltaw.adapters.base import Adapter
from deltaw.adapters.host import HostLayer

__all__ = ["Linear"]


class Linear(HostLayer):
    """Hosts adapters on a linear layer, whatever its weight store: x (..., in) -> (..., out)."""

    @property
    def in_features(self) -> int:
        return self.store.shape[1]

    @property
    def out_features(self) -> int:
        return self.store.shape[0]

    def adapted(self, x: Tensor, active: list[Adapter], *args: Any, **kwargs: Any) -> Tensor:
        first, *rest = active
        out = first.linear(x, self.store, self.bias)
        for adapter in rest:
            out = adapter.forward(x, out)
        return out
