"""DoRA on an embedding: a magnitude for each of the d columns of the table, as in PEFT.

``dora`` says what DoRA is; this file only says along what the norm is taken. Knows nothing of other layers.
"""

from __future__ import annotations

from torch import Tensor

from deltaw.adapters.methods.dora import SLOT, Scaled
from deltaw.adapters.methods.lora_embedding import LoraEmbedding
from deltaw.ops import rescale, row_norms, row_squares

__all__ = ["DoraEmbedding"]


class DoraEmbedding(Scaled, LoraEmbedding):
    """DoRA on one embedding: A (r, V), B (d, r), m (d,). The norm is over the vocabulary, before ``embed_scale``."""

    parameter_slots = (*LoraEmbedding.parameter_slots, SLOT)

    def outputs(self) -> tuple[int, ...]:
        return self.host.store.shape[1:]

    def squares(self) -> Tensor:
        return row_squares(self._columns())

    def compute_norm(self) -> Tensor:
        return row_norms(self.base_squares(), self._columns(), self.lora_A, self.lora_B, self.scaling)

    def _columns(self) -> Tensor:
        return self.host.store.dequantize().detach().t()  # (d, V)

    def along_outputs(self, gain: Tensor) -> Tensor:
        return gain  # W is (V, d)

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        return rescale(super().forward(x, base_out), None, self.magnitude, self.norm())
