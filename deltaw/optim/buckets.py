"""Parameters that are updated together: their states lie flat beside each other, so that hundreds of small tensors cost
a handful of kernel calls.

Each parameter begins a block of its own, so its states do not depend on its neighbours. Knows nothing of the settings
or of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.optim.memory import Memory, Spec
from deltaw.optim.update import BLOCKSIZE

__all__ = ["CHUNK", "Bucket", "Piece", "Scratch", "flat", "grad_of", "kinds", "pack"]

#: elements that one kernel call takes: what a core's cache holds, or what keeps a GPU busy
CHUNK = {"cpu": 2**18, "cuda": 2**24}


@dataclass(frozen=True)
class _Kind:
    """One state of a bucket: its dtype, and how many elements of the parameter share one of its own."""

    dtype: torch.dtype
    per: int = 1


_KINDS: dict[int, dict[str, _Kind]] = {
    32: {"exp_avg": _Kind(torch.float32), "exp_avg_sq": _Kind(torch.float32)},
    8: {
        "exp_avg": _Kind(torch.uint8),
        "exp_avg_absmax": _Kind(torch.float32, BLOCKSIZE),
        "exp_avg_sq": _Kind(torch.uint8),
        "exp_avg_sq_absmax": _Kind(torch.float32, BLOCKSIZE),
    },
}


def kinds(bits: int, param: Tensor) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """The states of ``param`` in so many bits: name -> dtype and shape."""
    blocks = torch.Size([-(-param.numel() // BLOCKSIZE)])
    return {name: (kind.dtype, param.shape if kind.per == 1 else blocks) for name, kind in _KINDS[bits].items()}


def pack(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """``params`` in their order, as many together as make a chunk; a larger one is alone."""
    together: list[Tensor] = []
    size = 0
    for param in params:
        if together and size + param.numel() > _chunk(param):
            yield together
            together, size = [], 0
        together.append(param)
        size += _padded(param.numel())
    if together:
        yield together


def flat(param: Tensor) -> bool:
    """Whether ``param`` and its gradient can be read and written as flat arrays where they are."""
    return param.is_contiguous() and grad_of(param).is_contiguous()


def grad_of(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert param.grad is not None
    return param.grad


def _padded(n: int) -> int:
    return -(-n // BLOCKSIZE) * BLOCKSIZE


def _chunk(param: Tensor) -> int:
    return CHUNK.get(param.device.type, CHUNK["cpu"])


class Bucket:
    """Some parameters of one device, and their states.

    Args:
        params: of one device; many small ones, or a single large one.
        bits: 32 or 8.
        memory: what keeps the states; they are there once :meth:`fill` was called.
    """

    def __init__(self, params: list[Tensor], bits: int, memory: Memory) -> None:
        self.params, self.bits, self.memory = params, bits, memory
        self.starts: list[int] = []
        self.size = 0
        for param in params:
            self.starts.append(self.size)
            self.size += _padded(param.numel()) if len(params) > 1 else param.numel()
        self.states: dict[str, Tensor] = {}
        self._views: tuple[Tensor, list[Tensor], list[Tensor]] | None = None

    def specs(self) -> list[Spec]:
        """What :meth:`fill` wants."""
        return [(-(-self.size // kind.per), kind.dtype) for kind in _KINDS[self.bits].values()]

    def fill(self, tensors: Sequence[Tensor]) -> None:
        self.states = dict(zip(_KINDS[self.bits], tensors, strict=True))

    def states_of(self, i: int) -> dict[str, Tensor]:
        """The states of the i-th parameter, views of those of the bucket."""
        start = self.starts[i]
        found = {}
        for name, (_, shape) in kinds(self.bits, self.params[i]).items():
            found[name] = self.states[name].narrow(0, start // _KINDS[self.bits][name].per, shape.numel()).view(shape)
        return found

    def pieces(self, steps: Mapping[Tensor, int], settings: Mapping[str, Any]) -> Iterator[Piece]:
        """What is to be updated: the parameters of ``steps``, each with the number of its step."""
        if len(self.params) == 1:
            for param in self.params:
                if param in steps:
                    chunk = _chunk(param) if flat(param) else max(1, param.numel())
                    for begin in range(0, param.numel(), chunk):
                        end = min(begin + chunk, param.numel())
                        yield self._piece([param], begin, end, steps[param], settings)
        elif len({steps.get(param) for param in self.params}) == 1 and self.params[0] in steps:
            yield self._piece(self.params, 0, self.size, steps[self.params[0]], settings)
        else:  # one of them had no gradient, now or before
            for param, begin in zip(self.params, self.starts, strict=True):
                if param in steps:
                    yield self._piece([param], begin, begin + param.numel(), steps[param], settings)

    def _piece(self, params: list[Tensor], begin: int, end: int, step: int, settings: Mapping[str, Any]) -> Piece:
        states = tuple(
            self.states[name][begin // kind.per : -(-end // kind.per)] for name, kind in _KINDS[self.bits].items()
        )
        first = begin if len(self.params) == 1 else 0
        return Piece(self, params, first, first + end - begin, states, step, settings)

    def views(self, scratch: Scratch) -> tuple[list[Tensor], list[Tensor]]:
        """Where values and gradients of each parameter lie in ``scratch``; made once."""
        if self._views is None or self._views[0] is not scratch.values:
            values, grads = (
                [
                    flat[start : start + param.numel()].view(param.shape)
                    for param, start in zip(self.params, self.starts, strict=True)
                ]
                for flat in (scratch.values, scratch.grads)
            )
            self._views = scratch.values, values, grads
        return self._views[1:]


@dataclass(frozen=True, eq=False)
class Piece:
    """One kernel call: elements ``begin`` to ``end`` of a single parameter, or all parameters of the bucket."""

    bucket: Bucket
    params: list[Tensor]
    begin: int
    end: int
    states: tuple[Tensor, ...]
    step: int
    settings: Mapping[str, Any]


@dataclass
class Scratch:
    """Two float32 arrays in which small parameters are brought together, kept from step to step."""

    values: Tensor = field(default_factory=lambda: torch.empty(0))
    grads: Tensor = field(default_factory=lambda: torch.empty(0))

    def gather(self, piece: Piece) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Values and gradients of ``piece`` as flat arrays, and where each parameter lies in both."""
        size, device = piece.end - piece.begin, piece.params[0].device
        if self.values.numel() < size or self.values.device != device:
            self.values, self.grads = (torch.zeros(size, dtype=torch.float32, device=device) for _ in range(2))
        values, grads = self.values[:size], self.grads[:size]
        grads.zero_()  # also between the parameters, where blocks are filled up: zeros leave an absmax as it is
        if len(piece.params) == 1:
            values_of, grads_of = [values.view(piece.params[0].shape)], [grads.view(piece.params[0].shape)]
        else:
            values_of, grads_of = piece.bucket.views(self)
        torch._foreach_copy_(values_of, piece.params)
        torch._foreach_copy_(grads_of, [grad_of(param) for param in piece.params])
        return values, grads, values_of, grads_of
