"""What a person sees while a run trains: a live bar on a terminal, plain lines anywhere else.

Knows nothing of models and data; reads the trainer's state and its logs only.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["ProgressCallback", "resident"]

# Where a log may carry its throughput and its count of tokens, the first that is there wins.
_RATE_KEYS = ("tokens_per_second", "train_tokens_per_second")
_TOKEN_KEYS = ("num_input_tokens_seen", "num_tokens")
_BYTES = 1024.0


class ProgressCallback(TrainerCallback):
    """Shows steps, loss, tokens/s, memory and the time that is left.

    Args:
        stream: where to write; standard error unless given, so that standard output stays for results.
        quiet: show nothing.
        live: True draws a bar, False writes lines; unset: a bar where ``stream`` is a terminal.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False, live: bool | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.quiet = quiet
        self.live = live
        self._bar: Any = None
        self._task: Any = None
        self._loss: float | None = None
        self._rate: float | None = None
        self._begun = 0.0
        self._first_step = 0  # a resumed run begins later than 0: its pace is measured from here
        self.first_tokens = 0  # tokens that were seen before this run began

    # --- what the trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.perf_counter()
        self._first_step = state.global_step
        self.first_tokens = _tokens_of(state, {}) or 0
        self._loss = self._rate = None
        if self.quiet or not state.is_world_process_zero:
            return
        self._bar = self._open_bar(state)
        if self._bar is None:
            self._line(f"training: {state.max_steps} steps, from step {state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, facts=self._facts())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._loss = float(logs["loss"])
        self._rate = self._rate_of(state, logs)
        if self.quiet or not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, facts=self._facts())
            if "eval_loss" in logs:
                self._bar.console.print(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}")
        elif "eval_loss" in logs:
            self._line(f"step {state.global_step}/{state.max_steps}  eval loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            left = self._seconds_left(state)
            eta = "" if left is None else f"  {_clock(left)} left"
            self._line(f"step {state.global_step}/{state.max_steps}  {self._facts()}{eta}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, facts=self._facts())
        self.close()

    def close(self) -> None:
        """Give the terminal back; safe to call twice, and to be called when training was interrupted."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    # --- what is drawn

    def _open_bar(self, state: TrainerState) -> Any:
        live = self.live if self.live is not None else bool(getattr(self.stream, "isatty", lambda: False)())
        if not live:
            return None
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            return None  # plain lines say the same
        bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", style="cyan"),
            TimeRemainingColumn(compact=True),
            TextColumn("left", style="dim"),
            console=Console(file=self.stream, highlight=False),
        )
        self._task = bar.add_task("train", total=state.max_steps, completed=state.global_step, facts="")
        bar.start()
        return bar

    def _facts(self) -> str:
        facts = []
        if self._loss is not None:
            facts.append(f"loss {self._loss:.4f}")
        if self._rate is not None:
            facts.append(f"{self._rate:,.0f} tok/s")
        facts.append(_memory())
        return "  ".join(facts)

    def _line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def _rate_of(self, state: TrainerState, logs: Mapping[str, Any]) -> float | None:
        for key in _RATE_KEYS:
            if key in logs:
                return float(logs[key])
        tokens = _tokens_of(state, logs)
        elapsed = time.perf_counter() - self._begun
        if not tokens or tokens <= self.first_tokens or elapsed <= 0:
            return self._rate
        return (tokens - self.first_tokens) / elapsed

    def _seconds_left(self, state: TrainerState) -> float | None:
        done = state.global_step - self._first_step
        if done <= 0:
            return None
        return (time.perf_counter() - self._begun) / done * (state.max_steps - state.global_step)


def _tokens_of(state: TrainerState, logs: Mapping[str, Any]) -> int | None:
    for key in _TOKEN_KEYS:
        if key in logs:
            return int(logs[key])
    return getattr(state, "num_input_tokens_seen", None) or None


def _memory() -> str:
    """Memory in use: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.memory_allocated() / _BYTES**3:.1f} GiB GPU"
    return f"{resident() / _BYTES**3:.1f} GiB"


def resident() -> int:
    """Bytes of this process in memory; where the system does not tell, the largest it has been."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts it in KiB


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
