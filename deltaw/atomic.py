"""Files that are whole or not there: written aside, flushed to the disk, renamed into place.

Knows nothing of what the files hold. A process that is killed at any moment leaves the old or the new, never half.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["aside", "flush", "flush_tree", "publishing", "write_text"]

Where = str | os.PathLike[str]

#: readers take a folder for a model or an adapter only if it holds one of these
_KEYS = ("adapter_config.json", "config.json")
#: a card that is there already is its writer's
_LEFT = ("README.md",)


def flush(path: Where) -> None:
    """Waits until a file, or the names in a folder, are on the disk and not only in the system's memory."""
    if os.path.isdir(path) and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders, and needs no flush for names
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot do it for this kind
            raise
    finally:
        os.close(handle)


def flush_tree(folder: Where) -> None:
    """:func:`flush` for everything under ``folder``, and for ``folder``: what is inside first."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            flush(os.path.join(place, name))
        flush(place)


@contextmanager
def aside(path: Where) -> Iterator[Path]:
    """A place to write the next content of ``path``, which replaces it when the block ends well.

    Several of them may be nested: each is on the disk before the first is renamed, the innermost.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        flush(part)
        os.replace(part, path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Where, text: str) -> None:
    """The whole file or none of it, in UTF-8; folders on the way are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def publishing(folder: Where, *, keys: Collection[str] = _KEYS) -> Iterator[Path]:
    """An empty folder to write in; when the block ends well, its files replace those of the same names in ``folder``.

    No reader ever takes a mix of old and new for whole. Everything new is on the disk before anything old is touched,
    so that a full disk or a kill until then leaves the old. Then the old files named in ``keys``, without which no
    reader takes the folder for anything, are taken away, the others replaced one by one, and those in ``keys`` come
    last. A kill in these few renames leaves a folder that no reader takes for an adapter. A ``README.md`` that is there
    is left alone.
    """
    folder = Path(folder)
    staged = folder / ".saving.part"
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
    staged.mkdir(parents=True)
    try:
        yield staged
        _publish(staged, folder, keys)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _publish(staged: Path, folder: Path, keys: Collection[str]) -> None:
    flush_tree(staged)
    names = [path.relative_to(staged) for path in sorted(staged.rglob("*")) if path.is_file()]
    names = [name for name in names if not (name.name in _LEFT and (folder / name).exists())]
    names.sort(key=lambda name: (name.name in keys, -len(name.parts)))  # the folder's own key is the very last
    replaced = staged / ".replaced"
    made: list[Path] = []
    try:
        for name in reversed(names):
            if name.name in keys and (folder / name).exists():
                _move(folder / name, replaced / name)
                flush((folder / name).parent)
        for name in names:
            if (folder / name).exists():
                _move(folder / name, replaced / name)
            _move(staged / name, folder / name)
            made.append(folder / name)
    except BaseException:  # an error, not a kill: the old is put back
        for path in made:
            path.unlink()
        for path in [path for path in sorted(replaced.rglob("*")) if path.is_file()]:
            os.rename(path, folder / path.relative_to(replaced))
        raise
    for place in {(folder / name).parent for name in names} | {folder}:
        flush(place)


def _move(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    os.replace(old, new)
