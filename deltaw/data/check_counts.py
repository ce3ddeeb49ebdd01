"""The counts of a check: lengths and their histogram, waste by padding and packing, steps, and what is odd about them.

Knows nothing of tokens: it is given lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deltaw.data.check_report import CheckReport, Finding
from deltaw.data.order import batch_waste

__all__ = ["Training", "count_lengths", "histogram", "steps_of", "training_findings"]

_BARS = 20
_SMALL = 1000  # examples
_MANY_EPOCHS = 3.0
_FEW_STEPS = 10
_MUCH_PADDING = 0.3


@dataclass(frozen=True)
class Training:
    """How a trainer will read the examples; the fields are TrainingArguments', summed over devices.

    Args:
        batch_size: examples of a micro-step.
        gradient_accumulation_steps: micro-steps of an optimizer step.
        num_train_epochs: None where nothing is known of the run.
        max_steps: above 0, decides in place of the epochs.
        packing, padding_free, group_by_length: how batches are made.
    """

    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float | None = None
    max_steps: int = -1
    packing: bool = False
    padding_free: bool = False
    group_by_length: bool = False


def count_lengths(report: CheckReport, lengths: np.ndarray, training: Training, max_length: int | None) -> None:
    """Lengths (n,) into the report: what they are, and how much of batches and packed rows is empty."""
    report.batch_size = training.batch_size
    if not len(lengths):
        return
    ordered = np.sort(lengths)
    last = len(ordered) - 1
    report.length_min, report.length_max = int(ordered[0]), int(ordered[-1])
    report.length_median, report.length_p95 = int(ordered[last // 2]), int(ordered[round(last * 0.95)])
    report.histogram = histogram(ordered)
    fitting = None if max_length is None or report.length_max > max_length else max_length
    report.waste = batch_waste(lengths, training.batch_size, fitting)
    report.padding_waste = report.waste["group_by_length" if training.group_by_length else "random"]


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, how many), range after range, from the shortest to the longest."""
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, math.ceil((high - low + 1) / _BARS))
    counts = np.bincount((lengths - low) // width)
    return [(low + i * width, min(high, low + (i + 1) * width - 1), int(count)) for i, count in enumerate(counts)]


def steps_of(examples: int, training: Training) -> int:
    """Optimizer steps of the run over so many examples (rows, where they are packed); 0 where nothing says."""
    if training.max_steps > 0:
        return training.max_steps
    if training.num_train_epochs is None:
        return 0
    batches = math.ceil(examples / training.batch_size)
    return math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))


def training_findings(report: CheckReport, training: Training) -> Iterator[Finding]:
    """Findings about the run that these examples would make."""
    n = report.examples
    if not n:
        return
    step = training.batch_size * training.gradient_accumulation_steps
    packed = training.packing or training.padding_free
    if training.num_train_epochs is not None and not training.packing:
        if n < step:
            yield Finding.of("few-rows", f"{n} examples, and an optimizer step takes {step}")
        if 0 < report.steps < _FEW_STEPS:
            yield Finding.of("few-steps", f"the run makes {report.steps} optimizer steps")
        epochs = training.max_steps * step / n if training.max_steps > 0 else training.num_train_epochs
        if n < _SMALL and epochs > _MANY_EPOCHS:
            yield Finding.of("many-epochs", f"{n} examples are seen {epochs:.3g} times each")
    if not packed and not training.group_by_length and report.padding_waste > _MUCH_PADDING:
        yield Finding.of("padding-waste", f"{report.padding_waste:.0%} of batches of {training.batch_size} is padding")
