"""The linear host: base and adapter in one fused step. Knows nothing of any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltaw.adapters.base import Adapter
from deltaw.adapters.host import HostLayer
from deltaw.adapters.lowrank import LowRank
from deltaw.adapters.routing import Run
from deltaw.ops import Update, mixed_linear
from deltaw.weights import only_multiplies

__all__ = ["Linear"]


class Linear(HostLayer):
    """Hosts adapters on a linear layer, whatever its weight store: x (..., in) -> (..., out)."""

    kind = "linear"

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._fused = only_multiplies(base_layer)

    @property
    def in_features(self) -> int:
        return self.store.shape[1]

    @property
    def out_features(self) -> int:
        return self.store.shape[0]

    def adapted(self, x: Tensor, active: list[Adapter], *args: Any, **kwargs: Any) -> Tensor:
        if not self._fused:
            return super().adapted(x, active, *args, **kwargs)
        computed = self.store.compute_dtype
        if computed not in (None, x.dtype):
            return self.adapted(x.to(computed), active).to(x.dtype)
        first, *rest = active
        out = first.linear(x, self.store, self.bias)
        for adapter in rest:
            out = adapter.forward(x, out)
        return out

    def mixed(self, x: Tensor, runs: Sequence[Run], *args: Any, **kwargs: Any) -> Tensor:
        computed = self.store.compute_dtype
        if self._fused and computed not in (None, x.dtype):
            return self.mixed(x.to(computed), runs).to(x.dtype)
        updates: dict[str, Update] = {}
        for name in {run.name: None for run in runs if run.name is not None}:
            adapter = self.adapters[name]
            factors = adapter.factors() if isinstance(adapter, LowRank) and adapter.plain else None
            if factors is None or factors.bias is not None or not self._fused:
                return super().mixed(x, runs, *args, **kwargs)
            updates[name] = Update(factors.A, factors.B, factors.scaling, factors.dropout)
        place = {name: index for index, name in enumerate(updates)}
        spans = [(run.stop - run.start, None if run.name is None else place[run.name]) for run in runs]
        return mixed_linear(x, self.store, self.bias, list(updates.values()), spans)
