"""The most memory that a piece of work had at once. Knows nothing of the demo."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch

from deltaw.footprint import resident

__all__ = ["Peak"]

SECONDS = 0.02  # between two looks


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
            held = resident()
            if held == held:  # not where the system does not tell
                self.bytes = max(self.bytes, int(held))
            if self._done.wait(SECONDS):
                return
