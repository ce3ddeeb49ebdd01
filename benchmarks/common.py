"""What the benchmarks share: the machine's name, timing in turns, peak memory of a process of its own, tables."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from deltaw import footprint


def machine() -> str:
    """CPU, cores and date, for the head of a table."""
    import torch
    import transformers

    cpu = platform.processor() or "CPU"
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
        flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
        cpu += " with " + ", ".join(f for f in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if f in flags.split())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{cpu}; {torch.get_num_threads()} threads; {versions}; {date.today().isoformat()}"


def in_turns(contestants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, one contestant after the other, ``rounds`` times over (warm-up rounds are dropped)."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + warmup):
        for name, call in contestants.items():
            started = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
            print(f"\rround {turn + 1}/{rounds + warmup}: {name:<28}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def spread(values: list[float], digits: int = 3) -> str:
    """``median (min to max)``."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(" --- " for _ in head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


class PeakMemory:
    """Largest anonymous resident memory (bytes) of this process above its value at entry, sampled every 2 ms.

    Anonymous memory leaves out the memory-mapped weights, which the page cache may share or drop at any time.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.base = self.peak = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous())

    @property
    def above(self) -> int:
        return self.peak - self.base


def anonymous() -> int:
    """Anonymous memory of this process in bytes."""
    held = footprint.anonymous()
    if held is None:
        raise RuntimeError("the system does not tell anonymous memory: it is measured on Linux only")
    return held


def own_process(script: str, *arguments: str) -> dict[str, Any]:
    """Runs ``script`` in a process of its own and returns the JSON object on its last line."""
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False, timeout=3600
    )
    if done.returncode != 0:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
