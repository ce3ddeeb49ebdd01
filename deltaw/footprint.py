"""How much memory this process holds, as the system tells it. Knows nothing of what it is held for."""

from __future__ import annotations

import math
import sys

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["anonymous", "private", "resident"]


def anonymous() -> int | None:
    """Bytes in memory now that no file backs, so that mapped weights do not count; None where the system is silent."""
    return _status("RssAnon")


def private() -> int | None:
    """Bytes of private writable memory, used or only mapped (what RLIMIT_DATA limits); None where it is not told."""
    return _status("VmData")


def resident() -> float:
    """Bytes in memory now; where that is not told, the most there have been; else nan."""
    now = _status("VmRSS")
    if now is not None:
        return now
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts it in KiB


def _status(name: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(f"{name}:"):
                    return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None
