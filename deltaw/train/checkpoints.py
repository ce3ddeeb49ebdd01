"""The folders of a run's checkpoints: written whole, marked, found again, thinned out.

Knows nothing of what is in them: a trainer writes the files, these functions see to it that a ``checkpoint-N`` is
complete or is not taken for one. One run at a time may write into a folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from deltaw.atomic import flush, flush_tree, write_text
from deltaw.errors import CheckpointError, ConfigError

__all__ = ["MARK", "checkpoints", "fault_of", "newest", "prune", "recover", "resolve", "saving", "writing"]

#: the file that says a checkpoint is complete: which files it has, and their bytes
MARK = "complete.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFT = re.compile(r"\.checkpoint-(\d+)\.(part|old)")

#: how torch.save says that it could not write
_WRITER = re.compile(r"inline_container|PytorchStreamWriter|open file failed|iostream error")

log = logging.getLogger("deltaw")

Where = str | os.PathLike[str]


# --- finding ---------------------------------------------------------------------------------------------------


def fault_of(folder: Where) -> str | None:
    """Why ``folder`` is no complete checkpoint that a run can go on from; None when it is one."""
    folder = Path(folder)
    if not folder.is_dir():
        return "no such folder"
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        sizes = {str(name): int(size) for name, size in mark["files"].items()}
        resumable = mark["resumable"]
    except FileNotFoundError:
        return f"it has no {MARK}: its writing was cut short, or it was not written by deltaw"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its {MARK} cannot be read ({error})"
    found = {name: path.stat().st_size for name in sizes if (path := folder / name).is_file()}
    wrong = [name for name, size in sizes.items() if found.get(name) != size]
    if wrong:
        told = [f"{name} ({found.get(name, 'no')} bytes, not {sizes[name]})" for name in sorted(wrong)]
        return "it is damaged: " + ", ".join(told)
    if not resumable:
        return "it holds the model alone (save_only_model): no optimizer states to go on from"
    return None


def checkpoints(run_dir: Where, *, complete: bool = True) -> list[Path]:
    """``checkpoint-N`` folders of a run, oldest step first.

    Args:
        complete: only those that a run can go on from.
    """
    if not Path(run_dir).is_dir():
        return []
    named = [(int(match[1]), path) for path in Path(run_dir).iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named) if path.is_dir() and not (complete and fault_of(path))]


def newest(run_dir: Where) -> Path | None:
    """The complete checkpoint of the latest step."""
    return next(reversed(checkpoints(run_dir)), None)


def resolve(
    resume: bool | str | os.PathLike[str] | None, run_dir: Where, tell: Callable[[str], object] = log.info
) -> Path | None:
    """The checkpoint that a run goes on from, or None when it starts anew.

    Args:
        resume: a folder; True: the newest complete one in ``run_dir``; ``"auto"``: that, or None where there is none.
        tell: is told which it became.

    Raises:
        CheckpointError: the folder is no complete checkpoint.
        ConfigError: True, and there is none.
    """
    if resume is None or resume is False:
        return None
    if resume is not True and str(resume) != "auto":
        if fault := fault_of(resume):
            raise CheckpointError(f"cannot go on from {resume}: {fault}.{_others(Path(resume).parent)}")
        tell(f"going on from {resume}")
        return Path(resume)
    recover(run_dir)
    found = newest(run_dir)
    passed = [path for path in checkpoints(run_dir, complete=False) if fault_of(path)]
    for path in passed:
        tell(f"passed over {path}: {fault_of(path)}")
    if found is None and resume is True:
        raise ConfigError(
            f"resume_from_checkpoint: {run_dir} holds no complete checkpoint"
            + (f" ({len(passed)} incomplete)" if passed else "")
            + '; leave it out to start anew, or say "auto" to go on only where there is one'
        )
    tell(f"no complete checkpoint in {run_dir}: starting anew" if found is None else f"going on from {found}")
    return found


def _others(run_dir: Path) -> str:
    found = newest(run_dir)
    return "" if found is None else f" The newest complete one beside it is {found}"


# --- writing ---------------------------------------------------------------------------------------------------


@contextmanager
def writing(
    run_dir: Where,
    step: int,
    *,
    writer: bool = True,
    wait: Callable[[], object] = lambda: None,
    resumable: bool = True,
) -> Iterator[Path]:
    """A folder to write a checkpoint in; it becomes ``checkpoint-STEP``, complete, when the block ends well.

    Until the one rename that puts it there it bears a hidden name. Every file and folder is flushed to the disk before.

    Args:
        writer: whether this process makes, marks and renames the folder; others only write into it.
        wait: returns when all processes have called it.
        resumable: whether it holds all that a run needs to go on.

    Raises:
        CheckpointError: a file could not be written; the older checkpoints are as they were.
    """
    run_dir = Path(run_dir)
    part, place = run_dir / f".checkpoint-{step}.part", run_dir / f"checkpoint-{step}"
    with saving(place):
        try:
            if writer:
                recover(run_dir)
                shutil.rmtree(part, ignore_errors=True)  # one that recover() found complete, of a place that is taken
                part.mkdir(parents=True)
            wait()
            yield part
            wait()
            if writer:
                _mark(part, step, resumable)
                _put(part, place)
            wait()
        finally:
            if writer:
                shutil.rmtree(part, ignore_errors=True)


def _mark(folder: Path, step: int, resumable: bool) -> None:
    """Says in ``folder`` that it is complete, once all of it is on the disk."""
    flush_tree(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    mark = {"format": _FORMAT, "step": step, "resumable": resumable, "files": sizes}
    write_text(folder / MARK, json.dumps(mark, indent=2) + "\n")


def _put(part: Path, place: Path) -> None:
    """Renames ``part`` to ``place``; one that is there goes aside first, and away after."""
    old = place.with_name(f".{place.name}.old")
    if place.exists():
        os.rename(place, old)  # killed here, recover() puts the new one in its place
    os.rename(part, place)
    flush(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(run_dir: Where) -> None:
    """Ends what a process that was killed had begun: a complete folder gets its name, anything else of it goes."""
    for path in sorted(Path(run_dir).glob(".checkpoint-*")):
        match = _LEFT.fullmatch(path.name)
        if match is None or path.is_symlink():
            continue
        place = path.with_name(f"checkpoint-{match[1]}")
        if match[2] == "part" and not place.exists() and (path / MARK).is_file():
            os.rename(path, place)
            flush(place.parent)
        else:
            shutil.rmtree(path, ignore_errors=True)


def prune(run_dir: Where, limit: int | None, keep: Collection[Where] = ()) -> None:
    """Deletes the oldest complete checkpoints beyond ``limit``, never the newest complete one nor those in ``keep``.

    Folders that are not complete are nobody's to delete and do not count.
    """
    if limit is None or limit <= 0:
        return
    # those that hold the model alone are as complete as they will be
    found = [p for p in checkpoints(run_dir, complete=False) if (p / MARK).is_file() and not p.is_symlink()]
    kept = {Path(path).resolve() for path in keep} | {path.resolve() for path in found[-1:]}
    if last := newest(run_dir):
        kept.add(last.resolve())
    spare = [path for path in found if path.resolve() not in kept]
    for path in spare[: max(0, len(found) - max(limit, len(kept)))]:
        gone = path.with_name(f".{path.name}.old")  # no reader sees it half deleted
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def saving(place: Path) -> Iterator[None]:
    """Failures to write ``place`` told with the room on its disk and with what is there to go on from.

    Raises:
        CheckpointError: in place of what the libraries raise, each its own, when a file cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _WRITER.search(str(error)):
            raise  # of the device, not of the disk
        if place.name.startswith("."):  # staged
            place = place.parent
        run_dir = place.parent
        there = next((folder for folder in (run_dir, *run_dir.parents) if folder.is_dir()), Path("/"))
        free = shutil.disk_usage(there).free
        found = newest(run_dir) or newest(place)
        older = f"{found} is complete" if found else "there is no older checkpoint"
        raise CheckpointError(
            f"{place} could not be written ({error}): a full disk, a quota, or no permission. The disk has "
            f"{free / 2**20:,.0f} MiB free. What was there is untouched ({older}); make room, or name another "
            "output_dir, and go on with resume_from_checkpoint: auto"
        ) from error
