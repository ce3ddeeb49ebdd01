"""Tokens on their way into arrays: in memory while they are few, in flat files when they are many.

Knows nothing of rows or tokenizers. What is written is opened again by :meth:`TokenDataset.open`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deltaw.data.tokens import COLUMNS, FORMAT, MARKER, TokenDataset
from deltaw.errors import DataError
from deltaw.held import Hold

__all__ = ["MEMORY", "TokenWriter", "made_at", "require_intact"]

MEMORY = 32 << 20  # bytes kept in memory before files are used


class TokenWriter:
    """Joins data sets, one after the other, into one.

    Args:
        new_folder: gives the folder to write to, when it is first needed.
        memory: bytes that stay in memory; 0 writes files in any case.

    As a context, it closes its files at the end, and lets its folder go if nothing was finished.
    """

    def __init__(self, new_folder: Callable[[], Hold], memory: int = MEMORY) -> None:
        self._new_folder = new_folder
        self._memory = memory
        self._parts: list[TokenDataset] = []
        self._bytes = 0
        self._held: Hold | None = None
        self._files: dict[str, BinaryIO] = {}
        self._digests: dict[str, Any] = {}
        self._examples = self._tokens = self._dropped = 0

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if self._held is not None:
            self._held.release()

    def add(self, part: TokenDataset) -> None:
        """Appends the examples of ``part``."""
        self._dropped += part.dropped
        self._parts.append(part)
        self._bytes += sum(getattr(part, name).nbytes for name in COLUMNS)
        if self._held is not None or self._bytes > self._memory:
            with self._writing():
                self._spill()

    def finish(self, fingerprint: str = "") -> TokenDataset:
        """All that was added, as one data set; of its files, if there are any."""
        if self._held is None and self._memory:
            return self._joined(fingerprint)
        with self._writing():
            self._spill()
            for file in self._files.values():
                file.close()
        assert self._held is not None
        held, self._held = self._held, None  # the data set's from now on
        said = {
            "format": FORMAT,
            "examples": self._examples,
            "tokens": self._tokens,
            "dropped": self._dropped,
            "fingerprint": fingerprint,
            "made": datetime.now().astimezone().isoformat(timespec="seconds"),
            "sha256": {name: digest.hexdigest() for name, digest in self._digests.items()},
        }
        with self._writing():
            (held.folder / MARKER).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        return TokenDataset.open(held.folder, held=held)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the tokens cannot be written: {error}; free some space there, or name another folder: TMPDIR for "
                "tokens that are not cached, DELTAW_HOME for those that are"
            ) from error

    def _spill(self) -> None:
        if self._held is None:
            self._held = self._new_folder()
            for name in COLUMNS:
                self._files[name] = (self._held.folder / f"{name}.bin").open("wb")
                self._digests[name] = hashlib.sha256()
            self._write("offsets", np.zeros(1, np.int64))
        for part in self._parts:
            for name in COLUMNS:
                array = getattr(part, name)
                self._write(name, array[1:] + self._tokens if name == "offsets" else array)
            self._tokens += part.tokens
            self._examples += len(part)
        self._parts.clear()

    def _write(self, name: str, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array, COLUMNS[name]).data.cast("B") if array.size else b""
        self._files[name].write(data)
        self._digests[name].update(data)

    def _joined(self, fingerprint: str) -> TokenDataset:
        parts = self._parts or [TokenDataset.of([])]
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS if name != "offsets"
        }
        offsets = np.zeros(sum(map(len, parts)) + 1, np.int64)
        np.cumsum(np.concatenate([part.lengths for part in parts]), out=offsets[1:])
        return TokenDataset(**arrays, offsets=offsets, dropped=self._dropped, fingerprint=fingerprint)


def require_intact(folder: Path) -> None:
    """Reads the files in a folder once and compares them with what was written.

    Raises:
        DataError: a file that is missing, or has changed.
    """
    try:
        written = json.loads((folder / MARKER).read_text(encoding="utf-8"))["sha256"]
        for name in COLUMNS:
            with (folder / f"{name}.bin").open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != written[name]:
                    raise DataError(f"{file.name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder} holds no complete token files: {error!r}") from error


def made_at(folder: Path) -> str:
    """When the files in a folder were made, for people to read."""
    said = json.loads((folder / MARKER).read_text(encoding="utf-8"))["made"]
    return datetime.fromisoformat(said).strftime("%Y-%m-%d %H:%M")
