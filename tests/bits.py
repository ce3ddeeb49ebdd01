"""Equal bit for bit, and on which instruction sets the kernels for CPUs can run here."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.errors import ConfigError
from deltaw.quant import native

__all__ = ["all_same", "available", "same"]


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit, where a NaN is a NaN."""
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    whole = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    fine = ~(ours.isnan() & theirs.isnan())
    return ours.dtype == theirs.dtype and torch.equal(ours.view(whole)[fine], theirs.view(whole)[fine])


def all_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def available() -> list[str]:
    """The instruction sets of this machine."""
    before, here = native.instruction_set(), []
    for name in native.INSTRUCTION_SETS:
        try:
            native.select(name)
        except ConfigError:
            continue
        here.append(name)
    native.select(before)
    return here
