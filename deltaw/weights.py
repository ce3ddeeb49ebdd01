"""How a base weight is kept: the weight-store contract, and its dense stores.

A store is a handle on one weight of one module. It reads (``dequantize``), lends (``lent``), is written
(``requantize_``) and multiplies (``linear``, ``few``). Whoever adapts a weight sees only this contract, so a quantized
weight is one new store and one :func:`register_store` line. Knows nothing of adapters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "DenseStore",
    "Kind",
    "TransposedStore",
    "WeightStore",
    "has_store",
    "is_a",
    "is_finite",
    "only_multiplies",
    "register_store",
    "store_of",
    "wide",
]


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if that is what it is: the precision in which updates are added up."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, found through the extremes: 20 times faster on a CPU than asking each."""
    if not tensor.numel():
        return True
    return all(math.isfinite(extreme) for extreme in tensor.detach().aminmax())


class WeightStore(ABC):
    """A handle on one weight: (out, in) of a linear layer, (V, d) of an embedding, (out, in / groups, *kernel) of a
    convolution.

    ``shape`` is that of the logical weight; ``dtype`` is what :meth:`dequantize` returns.
    """

    def __init__(self, module: nn.Module, name: str = "weight") -> None:
        self.module = module
        self.name = name

    @property
    @abstractmethod
    def shape(self) -> torch.Size: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    def requires_grad(self) -> bool:
        """Whether the weight itself is being trained (a quantized weight never is)."""
        return False

    @property
    def quantized(self) -> bool:
        """Whether it holds fewer values than ``dtype`` has, so that what is written is not what is read."""
        return False

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """In which dtype the layer multiplies, whatever its input's; None: in its input's."""
        return None

    def stored(self) -> Sequence[Tensor]:
        """The tensors that hold the weight as they lie in memory: it does not change unless one of them does."""
        return [getattr(self.module, self.name)]

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight as a plain tensor; for a dense store the very parameter, not a copy."""

    def lent(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """The weight in ``dtype`` for the length of one product: ``with store.lent(dtype) as weight: x @ weight.t()``.

        The memory may be someone else's after the block, so neither the tensor nor a view of it outlives the block, and
        autograd does not see it: for code that runs without a graph, as the hand-written operations do.
        """
        weight = self.dequantize()
        return nullcontext(weight if weight.dtype == dtype else weight.to(dtype))

    @abstractmethod
    def requantize_(self, weight: Tensor) -> None:
        """Writes ``weight``, rounding to what the store can hold."""

    @abstractmethod
    def keep(self) -> Any:
        """All that :meth:`restore_` needs to bring the present weight back bitwise."""

    @abstractmethod
    def restore_(self, kept: Any) -> None:
        """Undoes writes made since :meth:`keep`, bitwise."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> x W^T + bias, (..., out), with the weight of a linear layer."""
        return F.linear(x, self.dequantize(), bias)

    def few(self, x: Tensor) -> Tensor | None:
        """x (..., in) -> x W^T in float32, (..., out), without a dense weight and without a gradient, where the store
        has a way that is faster for so few rows; None where it has not."""
        return None


class DenseStore(WeightStore):
    """A weight kept as an ordinary parameter."""

    @property
    def parameter(self) -> Tensor:
        # looked up at each use: .to(), FSDP and weight tying replace the parameter under our feet
        return getattr(self.module, self.name)

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def requires_grad(self) -> bool:
        return self.parameter.requires_grad

    def dequantize(self) -> Tensor:
        return self.parameter

    @torch.no_grad()
    def requantize_(self, weight: Tensor) -> None:
        self.parameter.copy_(weight)

    def keep(self) -> Tensor:
        return self.parameter.detach().clone()

    @torch.no_grad()
    def restore_(self, kept: Tensor) -> None:
        self.parameter.copy_(kept)


class TransposedStore(DenseStore):
    """A linear layer's weight kept as a parameter (in, out), as GPT-2's ``Conv1D`` does; read and written as
    (out, in)."""

    @property
    def shape(self) -> torch.Size:
        return self.parameter.t().shape

    def dequantize(self) -> Tensor:
        """A view of the parameter, (out, in)."""
        return self.parameter.t()

    @torch.no_grad()
    def requantize_(self, weight: Tensor) -> None:
        self.parameter.copy_(weight.t())


#: a class, or its full name where its package is not imported just for this
Kind = type[nn.Module] | str

_STORES: list[tuple[Kind, Callable[[nn.Module], WeightStore]]] = []


def is_a(module: nn.Module, kind: Kind) -> bool:
    """``isinstance``, also for a class that is given by its full name."""
    if isinstance(kind, str):
        return any(f"{base.__module__}.{base.__qualname__}" == kind for base in type(module).__mro__)
    return isinstance(module, kind)


def register_store(kind: Kind, make: Callable[[nn.Module], WeightStore]) -> None:
    """Says how a kind of module keeps its weight; the newest registration that fits a module wins."""
    _STORES.insert(0, (kind, make))


def has_store(module: nn.Module) -> bool:
    """Whether the weight of ``module`` can be adapted: there is a store that reads it as real numbers."""
    store = next((make(module) for kind, make in _STORES if is_a(module, kind)), None)
    # a layer whose weight is packed bytes comes from a library that has no store here
    return store is not None and store.dtype.is_floating_point


def only_multiplies(module: nn.Module) -> bool:
    """Whether ``module`` runs the forward of the class that its store is for, and so does what the store does; a
    subclass may do more than that."""
    kind = next((kind for kind, _ in _STORES if is_a(module, kind)), None)
    own = next(base for base in type(module).__mro__ if "forward" in vars(base))
    return own is kind or f"{own.__module__}.{own.__qualname__}" == kind


def store_of(module: nn.Module) -> WeightStore:
    """The store of ``module``'s weight.

    Raises:
        TypeError: no store is registered for the type of ``module``.
    """
    for kind, make in _STORES:
        if is_a(module, kind):
            return make(module)
    raise TypeError(f"no weight store for {type(module).__name__}; register one with deltaw.weights.register_store")


register_store("transformers.pytorch_utils.Conv1D", TransposedStore)
for _kind in (nn.Conv3d, nn.Conv2d, nn.Conv1d, nn.Embedding, nn.Linear):  # the last is found first
    register_store(_kind, DenseStore)
