"""Folders that stay while a process holds them, and that whoever comes later may remove when none does.

Knows nothing of what is in them. A hold is a shared lock on a file within the folder: it ends with the process, however
that ends, so what a killed process left behind is told from what another one is using. Where there are no such
locks (Windows, some network file systems), a folder counts as held until it is a day old.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import secrets
import shutil
import time
import weakref
from pathlib import Path
from typing import Any

__all__ = ["Hold", "hold", "new_folder", "remove_unheld"]

LOCK = "lock"
STALE_SECONDS = 24 * 3600.0
SETTLED_SECONDS = 60.0  # by then a new folder has its lock

fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None


class Hold:
    """A folder in use by this process, until this object is gone or :meth:`release` is called.

    Args:
        folder: the folder.
        lock: an open, locked file descriptor, which the object owns.
        remove: delete the folder when the hold ends, at the latest when the interpreter exits.
    """

    def __init__(self, folder: Path, lock: int, remove: bool) -> None:
        self.folder = folder
        self._end = weakref.finalize(self, _let_go, folder, lock, os.getpid() if remove else None)

    def release(self) -> None:
        """Ends the hold now."""
        self._end()


def new_folder(parent: Path, prefix: str, *, mode: int = 0o777) -> Hold:
    """A fresh folder ``parent/prefix...``, held by this process and removed when the hold ends.

    Args:
        parent: made when it is not there.
        prefix: what its name begins with; the rest is random.
        mode: its permissions, less the umask.
    """
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(8)}"
        folder.mkdir(mode=mode)
        (folder / LOCK).touch()
        held = hold(folder, remove=True)
        if held is not None:  # else someone took it for a leftover between these lines
            return held


def hold(folder: Path, *, remove: bool = False) -> Hold | None:
    """Holds a folder made by :func:`new_folder`; None when it is not there, or is being removed just now.

    Args:
        remove: delete it when the hold ends.
    """
    lock = _locked(folder, exclusive=False)
    return None if lock is None else Hold(folder, lock, remove)


def remove_unheld(folder: Path) -> bool:
    """Deletes the folder unless some process holds it; whether it is gone."""
    lock = _locked(folder, exclusive=True)
    if lock is None:
        if not folder.exists():
            return True
        if (folder / LOCK).exists() or _young(folder, SETTLED_SECONDS):
            return False
    aside = folder.with_name(f".{folder.name.lstrip('.')}.{secrets.token_hex(8)}")
    try:
        folder.rename(aside)  # in one step, so that nobody finds half of it
        shutil.rmtree(aside, ignore_errors=True)
    except OSError:
        return not folder.exists()
    finally:
        if lock is not None:
            os.close(lock)
    return True


def _locked(folder: Path, *, exclusive: bool) -> int | None:
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    if not _lock(lock, folder, exclusive) or not _is_there(lock, folder):
        os.close(lock)
        return None
    return lock


def _lock(lock: int, folder: Path, exclusive: bool) -> bool:
    if fcntl is None:
        return not (exclusive and _young(folder))
    try:
        fcntl.flock(lock, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return not (exclusive and _young(folder))
    return True


def _is_there(lock: int, folder: Path) -> bool:
    """Whether the file that was locked is still the one in the folder."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(folder / LOCK))
    except OSError:
        return False


def _young(folder: Path, seconds: float = STALE_SECONDS) -> bool:
    try:
        return time.time() - folder.stat().st_mtime < seconds
    except OSError:
        return True


def _let_go(folder: Path, lock: int, remover: int | None) -> None:
    with contextlib.suppress(OSError):
        os.close(lock)
    if remover == os.getpid():  # never in a forked child, which may end long before its parent
        shutil.rmtree(folder, ignore_errors=True)
