"""A run in 4 bits beside the same run in 16: memory, accuracy and speed, from what the earlier run wrote down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text_to_sql.demo_show import SPLIT_NAMES, clock, megabytes

__all__ = ["Beside"]

#: what two runs must have in common to be compared
SAME = ("model", "seed", "questions", "train_rows")


@dataclass(frozen=True)
class Beside:
    """Two runs' facts.

    Attributes:
        this: of the run in 4 bits.
        other: of the one in 16 bits; None where there is none that can be compared.
        why: there is none, in words.
    """

    this: Mapping[str, Any]
    other: Mapping[str, Any] | None
    why: str = ""

    @classmethod
    def read(cls, path: Path, this: Mapping[str, Any]) -> Beside:
        """The earlier run from its ``results.json``."""
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls(this, None, f"there is no 16-bit run in {path}: `make demo` makes one to compare with")
        unlike = [key for key in SAME if other.get(key) != this[key]]
        if other.get("load_in_4bit", True) or "memory" not in other:
            unlike.append("load_in_4bit")
        if unlike:
            return cls(this, None, f"the run in {path} has another {', '.join(unlike)}, so the two are not compared")
        return cls(this, other)

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, in 16 bits, in 4 bits), as text."""
        assert self.other is not None
        runs = (self.other, self.this)
        lines = [
            ("weights of the base", [megabytes(run["memory"]["weights"]) for run in runs]),
            ("most memory while training", [megabytes(run["memory"]["training"]) for run in runs]),
            ("training", [f"{run['steps']} steps in {clock(run['train_seconds'])}" for run in runs]),
            ("tokens a second", [f"{run['train_tokens'] / run['train_seconds']:,.0f}" for run in runs]),
            ("optimizer", [run["recipe"].get("optim", "adamw") for run in runs]),
        ]
        for split, name in SPLIT_NAMES.items():
            if all(split in run["after"] for run in runs):
                lines.append((name, [f"{run['after'][split]['value']:.0%}" for run in runs]))
        return [(what, *cells) for what, cells in lines]  # type: ignore[misc]
