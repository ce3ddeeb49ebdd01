"""The folder that deltaw keeps on a machine. Knows nothing of what is kept in it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_home"]


def cache_home() -> Path:
    """The folder of converted models and of tokens: $DELTAW_HOME, else ~/.cache/deltaw."""
    return Path(os.environ.get("DELTAW_HOME") or "~/.cache/deltaw").expanduser()
