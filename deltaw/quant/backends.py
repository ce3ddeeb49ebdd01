"""Which kernels run: each backend is a module with the five functions of :class:`Kernels`, reached through one table.

``reference`` is plain PyTorch and runs everywhere; every other backend is tested against it, bit for bit where it reads
and packs. A backend that cannot run here (nothing compiled, no GPU) is passed over, and that is said once when it costs
speed.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import Protocol, cast

import torch
from torch import Tensor

from deltaw.errors import ConfigError, did_you_mean
from deltaw.quant.packed import Packed

__all__ = ["BACKENDS", "VARIABLE", "Kernels", "backend_for", "backend_named"]

log = logging.getLogger("deltaw")

#: name -> its module; for a device, the first that can run there is taken
BACKENDS = {
    "triton": "deltaw.quant.triton",
    "native": "deltaw.quant.native",
    "reference": "deltaw.quant.nf4",
}
#: forces one of them
VARIABLE = "DELTAW_QUANT_BACKEND"


class Kernels(Protocol):
    """What a backend does. Tensors lie on one device; all are contiguous unless a function says otherwise."""

    def unavailable(self, device: torch.device) -> str:
        """Why it cannot run on ``device``, in words; empty when it can."""
        ...

    def quantize_4bit(self, weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
        """weight, any shape and floating dtype -> codes uint8 [(n + 1) // 2], absmax float32 [ceil(n / blocksize)]."""
        ...

    def dequantize_4bit(self, packed: Packed, out: Tensor) -> None:
        """Writes the weight over ``out``, contiguous, of ``packed.shape``, float32, bfloat16 or float16: code * scale
        in float32, rounded to nearest even."""
        ...

    def linear_4bit(self, x: Tensor, packed: Packed) -> Tensor:
        """x (n, in) W^T -> (n, out) in x's dtype, with W as ``packed.dtype`` holds it, summed in float32, for the few
        rows of generation: the weight is never written out."""
        ...

    def quantize_8bit(self, values: Tensor, signed: bool, blocksize: int) -> tuple[Tensor, Tensor]:
        """float32 [n] -> codes uint8 [n] of the signed or unsigned dynamic map, absmax float32
        [ceil(n / blocksize)]."""
        ...

    def dequantize_8bit(self, codes: Tensor, absmax: Tensor, signed: bool, blocksize: int, out: Tensor) -> None:
        """Writes map[codes] * absmax over ``out``, float32 [n]."""
        ...


def backend_named(name: str) -> Kernels:
    """
    Raises:
        ConfigError: no backend of that name.
    """
    if name not in BACKENDS:
        raise ConfigError(
            f"{VARIABLE}={name!r}: no such backend; there are {list(BACKENDS)}{did_you_mean(name, BACKENDS)}"
        )
    return cast(Kernels, importlib.import_module(BACKENDS[name]))


def backend_for(device: torch.device) -> Kernels:
    """The kernels that run on ``device``.

    Raises:
        ConfigError: the one that the environment asks for does not exist, or cannot run there.
    """
    return _chosen(device.type, os.environ.get(VARIABLE, ""))


@functools.cache
def _chosen(device: str, forced: str) -> Kernels:
    if forced:
        kernels = backend_named(forced)
        why = kernels.unavailable(torch.device(device))
        if why:
            raise ConfigError(f"{VARIABLE}={forced}: it cannot run on {device}: {why}")
        return kernels
    passed: list[str] = []
    for name in BACKENDS:
        kernels = backend_named(name)
        why = kernels.unavailable(torch.device(device))
        if not why:
            break
        passed.append(f"{name}: {why}")
    if name == "reference" and device != "meta":
        log.warning("4-bit weights are read by plain PyTorch on %s, which is slow (%s)", device, "; ".join(passed))
    return kernels
