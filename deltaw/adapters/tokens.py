"""``trainable_token_indices``: chosen rows of an embedding that train, and the output head tied to it, which follows.

Rows are replacements, not differences, so that a row of a freshly resized vocabulary means the same on another copy of
the base. Knows nothing of the method beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapters.base import Adapter, drawing, settle
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.hosts.embedding import Embedding
from deltaw.errors import AdapterError, MergeError
from deltaw.modules import matches
from deltaw.weights import wide

__all__ = ["FollowedRows", "FollowingHost", "TokenHost", "TokenRows"]


# --- the layers ---------------------------------------------------------------------------------------------------


class TokenAdapter(nn.Module):
    """The base layer and the rows, under the names that PEFT gives them: ``token_adapter.base_layer``, ..."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta = nn.ParameterDict()  # adapter name -> (n, d)
        self.lookup = nn.Module()  # a buffer (2, n) by adapter name: see TokenRows.lookup


class TokenHost(HostLayer):
    """Runs an embedding, or an output head, with some of its rows replaced."""

    kind: ClassVar[str] = "tokens"
    of_method: ClassVar[bool] = False
    token_adapter: TokenAdapter

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.token_adapter = TokenAdapter(self._modules.pop("base_layer"))  # type: ignore[arg-type]
        self.token_indices: dict[str, list[int]] = {}

    @property
    def base_layer(self) -> nn.Module:  # type: ignore[override]
        return self.token_adapter.base_layer

    @property
    def trainable_tokens_delta(self) -> nn.ParameterDict:
        return self.token_adapter.trainable_tokens_delta

    @property
    def weight(self) -> Tensor:
        """The weight (V, d) as it is in force now: models read it off their embedding."""
        weight: Any = self.base_layer.weight
        for adapter in [] if self.merged_adapters else self.active():
            assert isinstance(adapter, TokenRows)
            weight = adapter.replaced(weight)
        return weight

    @property
    def bias(self) -> Tensor | None:
        return None  # rows do not touch it, so merging must not either

    @classmethod
    def unfit(cls, module: nn.Module) -> str:
        own = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
        if type(module).forward is not own.forward and not hasattr(module, "embed_scale"):
            return "its forward is not torch's own, and what it does besides reading its weight is not known"
        return Embedding.unfit(module) if own is nn.Embedding else super().unfit(module)

    def check_active(self, names: Sequence[str]) -> None:
        """
        Raises:
            AdapterError: two of ``names`` replace the same row.
        """
        for clash in self._clashes(names):
            raise AdapterError(f"{clash}, so only one of them can be active")

    def merged_tensors(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        for clash in self._clashes(names):
            raise MergeError(f"{clash}, so only one of them can be merged")
        return super().merged_tensors(names)

    def _clashes(self, names: Sequence[str]) -> Iterator[str]:
        owner: dict[int, str] = {}
        for name in dict.fromkeys(names):
            for row in self.adapters[name].rows if name in self.adapters else ():  # type: ignore[attr-defined]
                if row in owner:
                    yield f"adapters {owner[row]!r} and {name!r} each replace token {row} (trainable_token_indices)"
                owner[row] = name


class FollowingHost(TokenHost):
    """A layer whose weight is that of the embedding ``leader``: it runs with the leader's rows and holds none."""

    def __init__(self, base_layer: nn.Module, leader: TokenHost) -> None:
        super().__init__(base_layer)
        self._leader = (leader,)  # in a tuple: as a child its parameters would be here too

    @property
    def leader(self) -> TokenHost:
        return self._leader[0]


# --- the rows -----------------------------------------------------------------------------------------------------


class TokenRows(Adapter):
    """The rows (n, d) of one adapter that stand in the place of n rows of a weight (V, d).

    A row of the padding token trains like any other: whoever names it wants that.
    """

    parameter_slots = ("trainable_tokens_delta",)
    prefix = "trainable_tokens_"

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> TokenRows:
        assert isinstance(host, TokenHost)
        rows = rows_for(config, layer_name)
        with drawing(host):
            values = torch.empty(len(rows), host.store.shape[1])
        if not values.is_meta:
            values = host.store.dequantize().detach()[torch.tensor(rows, device=host.store.device)]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        lookup = torch.tensor([sorted(rows), order], device=host.store.device)
        host.token_adapter.lookup.register_buffer(name, lookup, persistent=False)
        host.token_indices[name] = list(rows)
        host.trainable_tokens_delta[name] = nn.Parameter(settle(host, values))
        return cls(host, name)

    @property
    def source(self) -> TokenHost:
        """The host that holds the rows."""
        assert isinstance(self.host, TokenHost)
        return self.host

    @property
    def rows(self) -> list[int]:
        """Which rows are replaced, in the order of :attr:`values`."""
        return self.source.token_indices[self.name]

    @property
    def values(self) -> Tensor:
        """What replaces them, (n, d)."""
        return self.source.trainable_tokens_delta[self.name]

    @property
    def lookup(self) -> Tensor:
        """(2, n): the rows in ascending order, and where in :attr:`values` each one lies."""
        return getattr(self.source.token_adapter.lookup, self.name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for key, parameter in super().named_parameters():
            yield f"token_adapter.{key}", parameter

    def remove(self) -> None:
        host: Any = self.source
        for held in (host.trainable_tokens_delta, host.token_indices):
            if self.name in held:
                del held[self.name]
        if self.name in host.token_adapter.lookup._buffers:
            delattr(host.token_adapter.lookup, self.name)

    def replaced(self, weight: Tensor) -> Tensor:
        """``weight`` (V, d) with the rows in place, in its dtype."""
        rows, places = self.lookup
        return weight.index_copy(0, rows, self.values[places].to(weight.dtype))

    def merged_weight(self, weight: Tensor) -> Tensor:
        return self.replaced(weight)

    def delta_weight(self) -> Tensor:
        weight = wide(self.host.store.dequantize().detach())
        return self.replaced(weight) - weight

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        """Replaces what came out of these rows; the table (V, d) itself is not copied.

        Args:
            x: ids (...) of an embedding, or the input (..., d) of an output head.
            base_out: (..., d) or (..., V).
        """
        layer, (rows, places) = self.host.base_layer, self.lookup
        if not isinstance(layer, nn.Embedding):
            out = F.linear(x, self.values[places].to(x.dtype))  # (..., n)
            if layer.bias is not None:
                out = out + layer.bias[rows].to(out.dtype)  # type: ignore[index]
            return base_out.index_copy_(-1, rows, out.to(base_out.dtype))  # in place: logits are the largest tensor
        x = x.to(rows)
        at = torch.searchsorted(rows, x).clamp(max=len(rows) - 1)
        out = F.embedding(places[at], self.values.to(self.host.store.dtype))  # (..., d)
        scale = getattr(layer, "embed_scale", None)
        if scale is not None:  # Gemma and others scale what they look up
            out = out * (scale.to(out.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((rows[at] == x).unsqueeze(-1), out.to(base_out.dtype), base_out)


def rows_for(config: Any, layer_name: str) -> list[int]:
    """The rows of this layer, after ``trainable_token_indices``."""
    wanted = config.trainable_token_indices
    if not isinstance(wanted, dict):
        return wanted
    return next(rows for key, rows in wanted.items() if matches(layer_name, [key]))


class FollowedRows(TokenRows):
    """The leader's rows, seen from a layer that shares its weight; nothing of its own to train or to save."""

    parameter_slots = ()

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> FollowedRows:
        return cls(host, name)

    @property
    def source(self) -> TokenHost:
        assert isinstance(self.host, FollowingHost)
        return self.host.leader

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # PEFT writes a second copy of the leader's rows here when it saves the embeddings too
        return {key: t for key, t in tensors.items() if key != "token_adapter.trainable_tokens_delta"}

    def remove(self) -> None:
        """The rows stay with the leader."""
