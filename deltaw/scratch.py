"""Memory that is borrowed for the length of one computation and used again by the next.

On a CPU a large new tensor is mapped, faulted in page by page and unmapped at each use, which takes longer than writing
it. Knows nothing of what is written into it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["borrowed", "release"]

#: what nobody has borrowed now. A list's pop and append are atomic, and a buffer is in no list while it is lent: two
#: threads, or one inside the other's block, get different buffers.
_free: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)


@contextmanager
def borrowed(shape: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
    """A contiguous tensor of ``shape`` on the CPU, filled with anything, until the block ends.

    As much memory stays reserved as was ever borrowed at one time (see :func:`release`).
    """
    n = math.prod(shape)
    try:
        buffer = _free[dtype].pop()
    except IndexError:
        buffer = None
    if buffer is None or buffer.numel() < n:
        del buffer  # before the larger one is there
        with torch.inference_mode(False):  # one made in inference mode could not be written to outside it
            buffer = torch.empty(n, dtype=dtype, device="cpu")
    try:
        yield buffer[:n].view(*shape)
    finally:
        _give_back(buffer)


def _give_back(buffer: Tensor) -> None:
    _free[buffer.dtype].append(buffer)


def release() -> None:
    """Gives the memory that nobody has borrowed now back to the system."""
    _free.clear()
