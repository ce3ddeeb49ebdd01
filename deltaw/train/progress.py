"""What a person sees while a run trains: a live bar on a terminal, plain lines anywhere else.

While the bar is drawn, warnings, log records and prints go above it and stay there. Knows nothing of models and data;
reads the trainer's state and its logs only.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltaw.footprint import resident

__all__ = ["ProgressCallback"]

# Where a log may carry its throughput and its count of tokens, the first that is there wins.
_RATE_KEYS = ("tokens_per_second", "train_tokens_per_second")
_TOKEN_KEYS = ("num_input_tokens_seen", "num_tokens")
_BYTES = 1024.0
_REDRAWN = 0.25  # seconds: faster than that nobody reads, and each drawing takes time from the step
_ANSWERS = 3  # that are shown after an evaluation
_WIDTH = 60  # characters of a question or an answer


class ProgressCallback(TrainerCallback):
    """Shows steps, loss, tokens/s, the gradient's norm, memory and the time that is left.

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
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._logs: dict[str, float] = {}  # what the facts are made of
        self._rate: float | None = None
        self._begun = self._drawn = 0.0
        self._answers: list[Any] = []  # of the evaluation that runs
        self._evaluated = 0  # batches of the evaluation that runs
        self._first_step = 0  # a resumed run begins later than 0: its pace is measured from here
        self.first_tokens = 0  # tokens that were seen before this run began

    # --- what the trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = time.perf_counter()
        self._first_step = state.global_step
        self.first_tokens = _tokens_of(state, {}) or 0
        self._logs, self._rate, self._evaluated = {}, None, 0
        if self.quiet or not state.is_world_process_zero:
            return
        self._bar = self._open_bar(state)
        if self._bar is None:
            self._line(f"training: {state.max_steps} steps, from step {state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None and self._due():
            self._bar.update(self._task, completed=state.global_step, facts=self._facts())

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated += 1
        if self._bar is not None and self._due():
            batches: Any = kwargs.get("eval_dataloader")
            of = f"/{len(batches)}" if hasattr(batches, "__len__") else ""
            self._bar.update(self._task, facts=f"evaluating, batch {self._evaluated}{of}  {_memory()}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._evaluated = 0

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
            self._logs = {key: float(logs[key]) for key in ("loss", "grad_norm", "nonfinite_steps") if key in logs}
            self._rate = self._rate_of(state, logs)
        if self.quiet or not state.is_world_process_zero:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, facts=self._facts())
        for key in [key for key in logs if key.startswith("eval_") and key.endswith("loss")]:
            self._say(f"step {state.global_step}/{state.max_steps}  {_evaluation(key.removesuffix('loss'), logs)}")
            for one in self._answers[:_ANSWERS]:
                verdict = "right" if one.right else f"expected {_short(one.expected)}"
                self._say(f"  {_short(one.question, end=True)} -> {_short(one.answer)}  ({verdict})")
            self._answers = []
        if "loss" in logs and self._bar is None:
            left = self._seconds_left(state)
            eta = "" if left is None else f"  {_clock(left)} left"
            self._say(f"step {state.global_step}/{state.max_steps}  {self._facts()}{eta}")

    def on_answers(self, state: TrainerState, answers: Sequence[Any]) -> None:
        """Keeps the answers of an evaluation: the first few are shown with its figures, beside what was expected."""
        self._answers = list(answers)

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
            for handler, stream in self._redirected:
                handler.setStream(stream)
            self._redirected = []
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
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", style="cyan", markup=False),
            TimeRemainingColumn(compact=True),
            TextColumn("left", style="dim"),
            console=Console(file=self.stream, highlight=False, soft_wrap=True),
            refresh_per_second=2,
        )
        self._task = bar.add_task("train", total=state.max_steps, completed=state.global_step, facts="")
        before = (sys.stdout, sys.stderr)
        bar.start()  # rich takes over the standard streams; handlers made before still hold the old ones
        for handler in _handlers():
            for old, new in zip(before, (sys.stdout, sys.stderr), strict=True):
                if handler.stream is old and new is not old:
                    self._redirected.append((handler, old))
                    handler.setStream(new)
                    break
        return bar

    def _due(self) -> bool:
        now = time.perf_counter()
        if now - self._drawn < _REDRAWN:
            return False
        self._drawn = now
        return True

    def _facts(self) -> str:
        facts = []
        if "loss" in self._logs:
            facts.append(f"loss {self._logs['loss']:.4f}")
        if self._rate is not None:
            facts.append(f"{self._rate:,.0f} tok/s")
        if "grad_norm" in self._logs:
            facts.append(f"grad {self._logs['grad_norm']:.2f}")
        if skipped := self._logs.get("nonfinite_steps"):
            facts.append(f"{skipped:.0f} skipped")
        facts.append(_memory())
        return "  ".join(facts)

    def _say(self, text: str) -> None:
        """A line that stays: above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            self._line(text)

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


def _evaluation(prefix: str, logs: Mapping[str, Any]) -> str:
    """``eval loss 0.2500  perplexity 1.28  ...``"""
    formats: dict[str, tuple[str, Callable[[float], str]]] = {
        "loss": ("loss", "{:.4f}".format),
        "perplexity": ("perplexity", "{:.4g}".format),
        "mean_token_accuracy": ("tokens right", "{:.1%}".format),
        "exact_match": ("answers right", "{:.1%}".format),
    }
    told = [
        f"{name} {form(float(logs[prefix + key]))}" for key, (name, form) in formats.items() if prefix + key in logs
    ]
    return f"{prefix.strip('_').replace('_', ' ')} {'  '.join(told)}"


def _handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Every handler of any logger that writes to a stream."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    seen = {id(handler): handler for one in loggers for handler in getattr(one, "handlers", [])}
    return (one for one in seen.values() if type(one) is logging.StreamHandler)


def _short(text: str, *, end: bool = False) -> str:
    """In quotes, on one line; of a long text its beginning, or its end."""
    text = " ".join(text.split())
    if len(text) > _WIDTH:
        text = f"...{text[-_WIDTH:]}" if end else f"{text[:_WIDTH]}..."
    return f"'{text}'"


def _tokens_of(state: TrainerState, logs: Mapping[str, Any]) -> int | None:
    for key in _TOKEN_KEYS:
        if key in logs:
            return int(logs[key])
    return getattr(state, "num_input_tokens_seen", None) or None


def _memory() -> str:
    """Memory in use: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.memory_allocated() / _BYTES**3:.1f} GiB GPU"
    used = resident()
    return "" if math.isnan(used) else f"{used / _BYTES**3:.1f} GiB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
