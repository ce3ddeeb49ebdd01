"""What a run was made of: fingerprints of its base, its data and its template, and the versions it ran on.

Knows nothing of how a run is done.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["base_fingerprint", "rows_fingerprint", "text_fingerprint", "versions"]

_EDGE = 1 << 20  # bytes read at each end of a weight file
_PACKAGES = ("deltaw", "torch", "transformers", "accelerate", "safetensors", "numpy")


def base_fingerprint(folder: str | Path) -> str | None:
    """A fingerprint of the weights and the config in a local folder; None where there is no such folder.

    Of each safetensors file its name, size, and first and last MiB count: any retrained or requantized model
    differs there, and a large model is fingerprinted in milliseconds. It is no defence against a forger.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as data:
            digest.update(data.read(_EDGE))
            data.seek(max(0, size - _EDGE))
            digest.update(data.read(_EDGE))
    return digest.hexdigest()


def rows_fingerprint(rows: Iterable[Mapping[str, Any]]) -> str:
    """A fingerprint of the rows and their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


def text_fingerprint(text: str | None) -> str | None:
    """A fingerprint of a text, such as a chat template."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide the arithmetic."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
