"""Which kind of layer hosts adapters: one line a kind. A method says which of them it supports."""

from __future__ import annotations

from torch import nn

from deltaw.adapters.host import HostLayer
from deltaw.adapters.hosts.conv import Conv
from deltaw.adapters.hosts.embedding import Embedding
from deltaw.adapters.hosts.linear import Linear
from deltaw.weights import Kind, has_store, is_a

__all__ = ["HOSTS", "host_type"]

#: base layer type -> host type; the first that fits wins
HOSTS: list[tuple[Kind, type[HostLayer]]] = [
    (nn.Linear, Linear),
    ("transformers.pytorch_utils.Conv1D", Linear),  # GPT-2's linear layer: its weight is stored (in, out)
    (nn.Embedding, Embedding),
    (nn.Conv1d, Conv),
    (nn.Conv2d, Conv),
    (nn.Conv3d, Conv),
]


def host_type(module: nn.Module) -> type[HostLayer] | None:
    """The host for ``module``, or None when it cannot carry adapters."""
    if isinstance(module, HostLayer):
        return type(module)
    if not has_store(module):
        return None
    return next((host for kind, host in HOSTS if is_a(module, kind)), None)
