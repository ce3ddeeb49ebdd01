"""Scores of predictions, each with the interval that its number of examples allows.

Knows nothing of models: texts and counts in, small results out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.errors import DataError

__all__ = ["Score", "exact_match", "normalize", "wilson_interval"]

_Z95 = 1.959963984540054  # the standard normal's 97.5% quantile


@dataclass(frozen=True)
class Score:
    """A share of right answers, with its Wilson 95% interval.

    Attributes:
        name: what was counted.
        right: how many were right.
        total: out of how many.
    """

    name: str
    right: int
    total: int

    @property
    def value(self) -> float:
        """The share, 0 to 1; 0 of 0 is 0."""
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the share."""
        return wilson_interval(self.right, self.total)

    def as_dict(self) -> dict[str, float | int]:
        """Plain numbers, for JSON."""
        low, high = self.interval
        return {"value": self.value, "right": self.right, "total": self.total, "low": low, "high": high}

    def __str__(self) -> str:
        low, high = self.interval
        bounds = f"{100 * low:.0f}-{100 * high:.0f}%"
        return f"{self.name} {100 * self.value:.1f}% ({self.right} of {self.total}, 95%: {bounds})"


def wilson_interval(right: int, total: int, z: float = _Z95) -> tuple[float, float]:
    """The score interval of Wilson (1927) for a share; sound near 0 and 1 and for few examples.

    Raises:
        ValueError: ``right`` is not within 0..total.
    """
    if not 0 <= right <= total:
        raise ValueError(f"{right} right of {total} is no share")
    if total == 0:
        return 0.0, 1.0
    p = right / total
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    middle = p + z * z / (2 * total)
    # at the ends the exact bound is the share itself; rounding must not step over it
    low = 0.0 if right == 0 else max(0.0, (middle - spread) / scale)
    high = 1.0 if right == total else min(1.0, (middle + spread) / scale)
    return low, high


def normalize(text: str) -> str:
    """``text`` with every run of white space as one blank, and none at the ends."""
    return " ".join(text.split())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> Score:
    """How many predictions equal their reference, white space aside.

    Raises:
        DataError: the two are not equally many.
    """
    if len(predictions) != len(references):
        raise DataError(
            f"exact match of {len(predictions)} predictions with {len(references)} references: "
            "give one reference for each"
        )
    right = sum(normalize(p) == normalize(r) for p, r in zip(predictions, references, strict=True))
    return Score("exact match", right, len(predictions))
