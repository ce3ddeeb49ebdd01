"""What a model's weights take, and the most memory that a piece of work had at once. Knows nothing of the demo."""

from __future__ import annotations

import resource
import threading
from types import TracebackType
from typing import Any

import torch

__all__ = ["Peak", "held"]

SECONDS = 0.02  # between two looks


def held(model: Any) -> int:
    """Bytes of all parameters and buffers of ``model``, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


class Peak:
    """Most bytes in memory between entry and exit: of this process, or of the GPU where ``model`` lies on one.

    A process counts all that it holds, the interpreter and its libraries too.
    """

    def __init__(self, model: Any) -> None:
        self.device = next(model.parameters()).device
        self.bytes = 0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._watch.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._done.set()
            self._watch.join()

    def _look(self) -> None:
        while True:
            self.bytes = max(self.bytes, _resident())
            if self._done.wait(SECONDS):
                return


def _resident() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # no Linux: the most it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
