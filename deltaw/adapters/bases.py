"""The weights that one base layer may hold: the one it was given, and those that single adapters were made over.

LoftQ, and PiSSA and OLoRA over a quantized weight, change the base: their A and B are right only beside what they left
in it. Such a weight lies in the layer while its adapter is active and the given one at all other times, so that
``disable_adapter``, other adapters and ``unload`` find the base that was loaded. Those that are not in the layer are
kept here; and what it cost to write one. Knows nothing of adapters or hosts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from deltaw.weights import WeightStore, wide

__all__ = ["Bases", "Rounding"]


class Rounding(NamedTuple):
    """What a merge into a quantized base cost one layer, in Euclidean norms.

    Attributes:
        error: of what was rounded off, merged weight minus what the base now holds.
        weight: of the merged weight.
        update: of ΔW.
    """

    error: float
    weight: float
    update: float

    @classmethod
    def between(cls, before: Tensor, merged: Tensor, held: Tensor) -> Rounding:
        before, merged, held = wide(before), wide(merged), wide(held)
        return cls(*(float(t.norm()) for t in (merged - held, merged, merged - before)))


class Bases:
    """Whose weight the layer holds now (``inside``; None: the one it was given), and the others."""

    def __init__(self) -> None:
        self.inside: str | None = None
        self._aside: dict[str | None, Any] = {}

    def __bool__(self) -> bool:
        """Whether any adapter has a weight of its own here."""
        return bool(self._aside)

    def __contains__(self, name: str) -> bool:
        return name == self.inside or name in self._aside

    def replace(self, store: WeightStore, name: str, weight: Tensor) -> None:
        """Writes ``weight`` (as near as the store can hold it) into the layer, as that which ``name`` is made over."""
        if self.inside != name:
            self._aside[self.inside] = store.keep()
            self.inside = name
        store.requantize_(weight)

    def put(self, store: WeightStore, name: str | None) -> None:
        """Brings the weight of ``name`` into the layer, bitwise; where it has none, the one that was given."""
        wanted = name if name in self._aside or name == self.inside else None
        if wanted == self.inside:
            return
        present = store.keep()
        store.restore_(self._aside.pop(wanted))
        self._aside[self.inside] = present
        self.inside = wanted

    def drop(self, store: WeightStore, name: str) -> None:
        """Forgets the weight of ``name``; if it is in the layer, the one that was given comes back."""
        if self.inside == name:
            self.put(store, None)
        self._aside.pop(name, None)
