"""Every error deltaw raises on purpose.

    DeltawError
    ├── ConfigError      (ValueError)   a setting that cannot work, found before any work
    │   └── TargetError                 target_modules and patterns that match nothing
    ├── AdapterError     (ValueError)   an operation on adapters that makes no sense now
    │   └── MergeError                  merging twice, a merge that is not finite, ...
    ├── CheckpointError  (ValueError)   files that do not fit the model, or are not ours to read
    ├── ModelError       (ValueError)   a model that cannot be found, loaded or trained this way
    ├── DataError        (ValueError)   rows that cannot be trained on
    ├── TrainingError    (RuntimeError) a run that had to stop; the message says what is left of it
    │   ├── NonFiniteError              losses or gradients that are not finite, again and again
    │   └── OutOfMemory                 memory ran out; the message says what takes most of it
    └── MissingExtra     (ImportError)  an optional package is absent; the message says which extra

A message names the act, the value and the cure; several faults are reported in one error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeltawError",
    "MergeError",
    "MissingExtra",
    "ModelError",
    "NonFiniteError",
    "OutOfMemory",
    "TargetError",
    "TrainingError",
    "did_you_mean",
]


class DeltawError(Exception):
    """Base of every error raised on purpose by deltaw."""


class ConfigError(DeltawError, ValueError):
    """A setting that cannot work, found before any work is done."""


class TargetError(ConfigError):
    """``target_modules`` or a pattern that matches no layer of the model."""


class AdapterError(DeltawError, ValueError):
    """An operation on adapters that makes no sense in the model's present state."""


class MergeError(AdapterError):
    """Adapters that cannot be merged or unmerged as asked."""


class CheckpointError(DeltawError, ValueError):
    """Files that do not fit the model, or that are not safe to read."""


class ModelError(DeltawError, ValueError):
    """A model that cannot be found, loaded or trained as asked."""


class DataError(DeltawError, ValueError):
    """Rows that cannot be trained on."""


class TrainingError(DeltawError, RuntimeError):
    """A run that had to stop."""


class NonFiniteError(TrainingError):
    """Losses or gradients that were not finite, too many times in a row."""


class OutOfMemory(TrainingError):
    """Memory ran out: of the device, or the limit that was set."""


class MissingExtra(DeltawError, ImportError):
    """An optional package is absent.

    Args:
        package: the import name that is missing.
        extra: the extra of deltaw that brings it.
        act: what was being done, as a gerund ("drawing the report").
    """

    def __init__(self, package: str, extra: str, act: str) -> None:
        super().__init__(f"{act} needs the package {package!r}: pip install 'deltaw[{extra}]'")


def did_you_mean(name: str, known: Iterable[str], n: int = 3) -> str:
    """``"; did you mean 'q_proj'?"`` for the nearest known names, or ``""`` when none is near."""
    near = difflib.get_close_matches(name, sorted(set(known)), n=n, cutoff=0.6)
    if not near:
        return ""
    return f"; did you mean {' or '.join(repr(k) for k in near)}?"
