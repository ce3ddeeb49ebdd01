"""Which kind of layer hosts adapters: one line a kind. A method says which of them it supports."""

from __future__ import annotations

from torch import nn

from deltaw.adapters.host import HostLayer
from deltaw.adapters.linear import Linear
from deltaw.weights import has_store

__all__ = ["HOSTS", "host_type"]

#: base layer type -> host type; the first that fits wins
HOSTS: list[tuple[type[nn.Module], type[HostLayer]]] = [(nn.Linear, Linear)]


def host_type(module: nn.Module, *, linear: bool = False) -> type[HostLayer] | None:
    """The host for ``module``, or None when it cannot carry adapters; with ``linear`` only linear layers
    count."""
    if isinstance(module, HostLayer):
        return type(module) if not linear or isinstance(module, Linear) else None
    for kind, host in HOSTS:
        if isinstance(module, kind) and has_store(module) and (not linear or issubclass(host, Linear)):
            return host
    return None
