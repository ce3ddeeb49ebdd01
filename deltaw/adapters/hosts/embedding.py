"""The host of embeddings: ids -> rows. Knows nothing of any method."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from deltaw.adapters.host import HostLayer

__all__ = ["Embedding"]


class Embedding(HostLayer):
    """Hosts adapters on an embedding, ids (...) -> rows (..., d); its weight is (V, d)."""

    kind = "embedding"

    @property
    def num_embeddings(self) -> int:
        return self.store.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.store.shape[1]

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx  # type: ignore[return-value]

    @classmethod
    def unfit(cls, module: nn.Module) -> str:
        if getattr(module, "max_norm", None) is not None:
            return "it shortens its rows to max_norm as it reads them, so an update cannot be added to them"
        if getattr(module, "sparse", False):
            return "it asks for sparse gradients, which an adapter's parameters cannot have; set its .sparse to False"
        # positions that are counted inside the layer: an adapter would be given something else than ids
        if len(inspect.signature(type(module).forward).parameters) != 2:
            return "its forward takes more than ids"
        return super().unfit(module)

    def look_up(self, table: Tensor, ids: Tensor) -> Tensor:
        """The rows of ``table`` (V, k) that ``ids`` name, read as the base reads its own weight: (..., k).

        A base that scales its rows (Gemma's ``embed_scale``) scales these too, and a padding row gets no gradient.
        Only the rows named are touched.
        """
        return torch.func.functional_call(self.base_layer, {"weight": table}, (ids,))
