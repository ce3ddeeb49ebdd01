"""A base layer and the adapters it carries: which are active, which are merged, and the merging itself.

A host knows the adapter contract and the weight-store contract, never a method or a quantizer.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaw.adapters.base import Adapter
from deltaw.adapters.bases import Bases, Rounding
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.routing import Routable, Run
from deltaw.errors import AdapterError, MergeError
from deltaw.weights import DenseStore, WeightStore, is_finite, store_of, wide

__all__ = ["HostLayer", "adapters_named", "host_layers"]


class HostLayer(Routable):
    """Wraps ``base_layer`` in place and holds any number of named adapters.

    Attributes follow PEFT's layers: ``base_layer``, ``active_adapters``, ``merged_adapters``,
    ``disable_adapters``, and one dictionary by adapter name for each kind of parameter (``lora_A``,
    ``scaling``, ...).
    """

    #: what a method says it supports: "linear", "embedding", ...
    kind: ClassVar[str] = ""
    #: whether its adapters are of the config's method, and not something that trains beside it (rows of tokens)
    of_method: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._adapters: dict[str, Adapter] = {}
        self._active: list[str] = []
        self._disabled = False
        self.merged_adapters: list[str] = []
        self.bases = Bases()
        self._kept: tuple[Any, Tensor | None] | None = None  # the base as it was before merging
        self.rounding: Rounding | None = None  # of a merge into a quantized base
        self._shared: nn.Parameter | None = None  # the weight that other modules share, while merged

    # --- the base -------------------------------------------------------------------------------------------

    @property
    def store(self) -> WeightStore:
        return store_of(self.base_layer)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    @classmethod
    def unfit(cls, module: nn.Module) -> str:
        """Why a base layer of this host's type cannot carry adapters after all, in words; empty when it can."""
        if isinstance(store_of(module), DenseStore) and module._parameters.get("weight") is None:
            return "its weight is computed anew at each forward (weight norm or another parametrization)"
        return ""

    # --- the adapters ---------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Adapter name -> view, in the order in which they were added."""
        return self._adapters

    @property
    def active_adapters(self) -> list[str]:
        return self._active

    @property
    def active_adapter(self) -> list[str]:
        return self._active

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def slot(self, name: str, kind: type) -> Any:
        """The dictionary ``name`` of this host, made on first use (ModuleDict, ParameterDict or dict).

        Raises:
            AdapterError: another method has one of another kind in its place.
        """
        held: Any = getattr(self, name, None)
        if held is not None and len(held) and not isinstance(held, kind):
            raise AdapterError(
                f"{name!r} of this layer holds the parameters of {', '.join(map(repr, held))}, of a method that keeps "
                "them in another form: the two cannot share a layer; delete that adapter first, or target other layers"
            )
        if not isinstance(held, kind):
            setattr(self, name, kind())
        return getattr(self, name)

    def add(self, method: type[Adapter], name: str, config: PeftConfig, layer_name: str) -> Adapter:
        """Creates adapter ``name`` of ``method`` on this layer; it is not active yet.

        Raises:
            AdapterError: an adapter of that name is here already.
        """
        if name in self._adapters:
            raise AdapterError(f"adapter {name!r} already exists on {layer_name!r}; delete it or use another name")
        try:
            adapter = method.create(self, name, config, layer_name)
        except BaseException:
            method(self, name).remove()  # what was made before it failed
            self.bases.drop(self.store, name)
            raise
        self._suit()
        for module in self.children():
            if module is not self.base_layer:
                module.train(self.training)  # a new dropout would start in training mode
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
        self._adapters[name] = adapter
        return adapter

    def remove(self, name: str) -> None:
        """Takes adapter ``name`` away; a merged one is unmerged first."""
        if name in self.merged_adapters:
            self.unmerge([name])
        self._adapters.pop(name).remove()
        self._active = [n for n in self._active if n != name]
        self.bases.drop(self.store, name)
        self._suit()

    def check_active(self, names: Sequence[str]) -> None:
        """
        Raises:
            AdapterError: ``names`` cannot be active together on this layer.
        """
        own = [name for name in names if name in self.bases]
        if len(own) > 1:
            raise AdapterError(
                f"adapters {own} cannot be active together: each was made over a base weight of its own "
                "(init_lora_weights); activate one of them"
            )

    def set_active(self, names: Sequence[str], trainable: bool = True) -> None:
        """Activates those of ``names`` that this layer has; their parameters train when ``trainable``."""
        self._active = [name for name in names if name in self._adapters]
        self._suit()
        for name, adapter in self._adapters.items():
            for parameter in adapter.parameters():
                parameter.requires_grad_(trainable and name in self._active)

    # PEFT's spelling
    set_adapter = set_active

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether the parameters of ``adapter_names`` train, active or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in self._adapters[name].parameters() if name in self._adapters else ():
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches all adapters of this layer on or off; off means the bare base, so merged ones come out
        first."""
        if not enabled and self.merged_adapters:
            self.unmerge()
        self._disabled = not enabled
        self._suit()

    def _suit(self) -> None:
        """Brings in the base weight that the active adapter was made over; while adapters are merged, it stays."""
        if self.bases and not self.merged_adapters:
            active = [] if self._disabled else self._active
            self.bases.put(self.store, next((name for name in active if name in self.bases), None))

    def active(self) -> list[Adapter]:
        """The adapters that take part in forward now (none when disabled)."""
        return [] if self._disabled else [self._adapters[name] for name in self._active]

    # --- forward --------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        runs = self.route(x)
        if runs is not None and len(runs) > 1:
            return self.mixed(x, runs, *args, **kwargs)
        if runs is not None:
            active = [self._adapters[run.name] for run in runs if run.name is not None]
        else:
            active = [] if self.merged_adapters else self.active()
        if not active:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted(x, active, *args, **kwargs)

    def adapted(self, x: Tensor, active: list[Adapter], *args: Any, **kwargs: Any) -> Tensor:
        """Forward through the base and the active adapters; a kind of layer overrides it for one fused
        step."""
        out = self.base_layer(x, *args, **kwargs)
        for adapter in active:
            out = adapter.forward(x, out)
        return out

    def mixed(self, x: Tensor, runs: Sequence[Run], *args: Any, **kwargs: Any) -> Tensor:
        """Forward of a batch whose runs of rows go through different adapters, each as if alone, or none; a kind of
        layer overrides it for one fused step."""
        out = self.base_layer(x, *args, **kwargs)
        pieces = [
            out[run.rows] if run.name is None else self._adapters[run.name].forward(x[run.rows], out[run.rows])
            for run in runs
        ]
        return torch.cat(pieces)

    def routes(self) -> Container[str]:
        return self._adapters

    def refusal(self) -> str | None:
        if self._disabled:
            return "the adapters are disabled: leave disable_adapter() first"
        if self.merged_adapters:
            return f"adapters {self.merged_adapters} are merged into the base: call unmerge_adapter() first"
        if self.bases:
            own = [name for name in self._adapters if name in self.bases]
            return (
                f"adapters {own} were made over base weights of their own (init_lora_weights): run them one at a time"
            )
        return None

    # --- merging --------------------------------------------------------------------------------------------

    def merged_tensors(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) in the base's dtype with ``names`` folded in: added in float32 or wider, rounded
        once.

        Raises:
            MergeError: an adapter of a kind that has no ΔW, or a result that is not finite.
        """
        store = self.store
        weight = store.dequantize().detach()
        bias = None if self.bias is None else wide(self.bias.detach())
        for name in names:
            adapter = self._adapters[name]
            if not adapter.mergeable:
                raise MergeError(f"adapter {name!r} ({type(adapter).__name__}) has no weight update to merge")
            weight = adapter.merged_weight(weight)
            bias = adapter.merged_bias(bias)
        weight = weight.to(store.dtype)
        bias = None if bias is None or self.bias is None else bias.to(self.bias.dtype)
        if not (is_finite(weight) and (bias is None or is_finite(bias))):
            raise MergeError(f"merging {list(names)} gives weights that are not finite; the base was left as it was")
        return weight, bias

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        self.store.requantize_(weight)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def merge(self, names: Sequence[str], keep: bool = True) -> None:
        """Folds ``names`` into the base weight.

        Args:
            keep: keep a copy of the base, so that :meth:`unmerge` brings it back bitwise.

        Raises:
            MergeError: one of them is merged already, or the result is not finite.
        """
        twice = [name for name in names if name in self.merged_adapters]
        if twice:
            raise MergeError(f"adapters {twice} are merged already; call unmerge_adapter() before merging again")
        names = [name for name in names if name in self._adapters]
        if not names:
            return
        inside = self.bases.inside
        if inside not in (None, *names, *self.merged_adapters) or any(n in self.bases and n != inside for n in names):
            own = [name for name in self._adapters if name in self.bases]
            raise MergeError(
                f"adapters {own} were made over a base weight of their own (init_lora_weights), which is there while "
                "they are active: activate one of them, and merge all that is active"
            )
        if self._kept is not None:
            # start again from the base, so that the sum is rounded once, however many merges it took
            self._restore()
            names = [*self.merged_adapters, *names]
        try:
            weight, bias = self.merged_tensors(names)
        except MergeError:
            if self.merged_adapters and self._kept is not None:
                self.write(*self.merged_tensors(self.merged_adapters))
            raise
        before = self.store.dequantize() if self.store.quantized else None
        if keep:
            self._kept = self._copy()
        self.write(weight, bias)
        self.merged_adapters = list(names)
        self.rounding = None if before is None else Rounding.between(before, weight, self.store.dequantize())

    @torch.no_grad()
    def unmerge(self, names: Sequence[str] | None = None) -> None:
        """Takes ``names`` (default: all) out of the base; with none left the base is bitwise what it was."""
        if not self.merged_adapters:
            return
        if self._kept is None:
            raise MergeError("the base was merged without keeping a copy, so it cannot be unmerged; reload the model")
        left = [name for name in self.merged_adapters if names is not None and name not in names]
        self._restore()
        if left and self.bases.inside in (None, *left):
            self.write(*self.merged_tensors(left))
            self.merged_adapters = left
        else:
            self._kept = self.rounding = None
            self.merged_adapters = []
            self.share_again()
            self._suit()
            if left:  # they were merged into the base of one that is taken out
                self.bases.put(self.store, None)
                self.merge(left)

    def own_weight(self) -> None:
        """Gives the base a copy of its weight, so that modules which share it are not written to."""
        shared: nn.Parameter = self.base_layer.weight  # type: ignore[assignment]
        self.base_layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        if self._shared is None:
            self._shared = shared

    def share_again(self) -> None:
        """Undoes :meth:`own_weight`."""
        if self._shared is not None:
            self.base_layer.weight = self._shared
            self._shared = None

    @property
    def shared(self) -> nn.Parameter | None:
        """The weight that the base shared with other modules, while it has one of its own."""
        return self._shared

    def bare_weight(self) -> Tensor:
        """The base's weight as it is without merged adapters."""
        if self._kept is None:
            return self.base_layer.weight  # type: ignore[return-value]
        merged = self._copy()
        self._put(self._kept)
        weight = self.weight.detach().clone()
        self._put(merged)
        return weight

    def _copy(self) -> tuple[Any, Tensor | None]:
        """All that :meth:`_put` needs to bring the base's weight and bias back bitwise."""
        return self.store.keep(), None if self.bias is None else self.bias.detach().clone()

    @torch.no_grad()
    def _put(self, copy: tuple[Any, Tensor | None]) -> None:
        weight, bias = copy
        self.store.restore_(weight)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    def _restore(self) -> None:
        assert self._kept is not None
        self._put(self._kept)


def host_layers(model: nn.Module) -> Iterator[tuple[str, HostLayer]]:
    """(name, host) for every layer of ``model`` that carries adapters."""
    for name, module in model.named_modules():
        if isinstance(module, HostLayer):
            yield name, module


def adapters_named(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Layer name -> the adapter of the method on it, for every layer of ``model`` that has one called ``name``."""
    return {path: h.adapters[name] for path, h in host_layers(model) if name in h.adapters and h.of_method}
