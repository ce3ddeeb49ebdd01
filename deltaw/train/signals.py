"""Ctrl-C and SIGTERM while a run trains: remembered until the step is done, then told as an exception.

Knows nothing of training: whoever works asks ``requested`` where stopping is safe. A second signal does not wait.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "StopSignals", "Stopped", "Terminated"]


class Stopped:
    """A run that was asked to stop, and did: what :class:`Interrupted` and :class:`Terminated` share.

    Attributes:
        signum: the signal that asked.
        checkpoint: the complete checkpoint to go on from; None where there is none.
    """

    signum: int
    checkpoint: Path | None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a command ended by the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class Interrupted(Stopped, KeyboardInterrupt):
    """Ctrl-C, after the step was finished and a checkpoint written."""

    def __init__(self, signum: int = signal.SIGINT, checkpoint: Path | None = None) -> None:
        self.signum, self.checkpoint = int(signum), checkpoint
        super().__init__(_told("interrupted", checkpoint))


class Terminated(Stopped, SystemExit):
    """SIGTERM, after the step was finished and a checkpoint written; uncaught, it ends the process with code 143."""

    def __init__(self, signum: int = signal.SIGTERM, checkpoint: Path | None = None) -> None:
        self.signum, self.checkpoint = int(signum), checkpoint
        super().__init__(self.exit_code)

    def __str__(self) -> str:
        return _told("terminated", self.checkpoint)


def _told(how: str, checkpoint: Path | None) -> str:
    return how + (f"; {checkpoint} is complete" if checkpoint else "; there is no checkpoint")


#: signal -> what is raised for it
_ENDS: dict[int, type[Interrupted | Terminated]] = {signal.SIGINT: Interrupted, signal.SIGTERM: Terminated}


class StopSignals:
    """Inside the block the first signal is remembered, a second one stops at once; afterwards all is as it was.

    Python lets only the main thread handle signals: in another thread, and where Ctrl-C is ignored, nothing changes.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.requested = None
        if threading.current_thread() is threading.main_thread():
            for signum in _ENDS:
                before = signal.getsignal(signum)
                if before is not signal.SIG_IGN:  # as nohup and a shell's background jobs have it
                    self._before[signum] = before
                    signal.signal(signum, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signum, before = self._before.popitem()
            # None: a handler that was not set from Python, which cannot be put back from here
            signal.signal(signum, signal.SIG_DFL if before is None else before)

    def ending(self, checkpoint: Path | None) -> Interrupted | Terminated:
        """The exception to raise for the signal that was received."""
        signum = self.requested or signal.SIGTERM  # another process of the run was asked: launchers send SIGTERM
        return _ENDS[signum](signum, checkpoint)

    def _take(self, signum: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signum
            return
        self.__exit__()  # a third one meets whoever was here before
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
