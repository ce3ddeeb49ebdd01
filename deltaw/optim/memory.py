"""Where optimizer states live: in ordinary memory, in a mapped file, or in pinned memory beside a GPU.

A memory hands out flat tensors of zeros, and leads through them in order when a step needs them, one ahead of their use
("paged optimizers", QLoRA, arXiv 2305.14314, section 3). Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.serialization import config as load_config

from deltaw.errors import ConfigError

__all__ = ["MappedMemory", "Memory", "PinnedMemory", "PlainMemory", "Spec", "mapped_loads", "page_folder"]

log = logging.getLogger("deltaw")

#: elements and dtype of a flat tensor
Spec = tuple[int, torch.dtype]
States = tuple[Tensor, ...]
_ALIGNED = 64  # bytes: one cache line, and more than any vector register
_IN_MEMORY = ("tmpfs", "ramfs")


class Stop(Protocol):
    """One stop on the way through the states: what is updated next."""

    @property
    def states(self) -> States: ...


S = TypeVar("S", bound=Stop)


class Memory(Protocol):
    """What keeps states."""

    def zeros(self, specs: Sequence[Spec]) -> list[Tensor]:
        """Flat tensors of zeros, one for each of ``specs``."""
        ...

    def visit(self, stops: Sequence[S]) -> Iterator[tuple[S, States]]:
        """Each stop with its states where a kernel can write them; that is kept once the next is asked for."""
        ...

    def settle(self) -> None:
        """Waits until all that was written can be read on the host."""
        ...


class PlainMemory:
    """On the device of the parameters."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def zeros(self, specs: Sequence[Spec]) -> list[Tensor]:
        return [torch.zeros(n, dtype=dtype, device=self.device) for n, dtype in specs]

    def visit(self, stops: Sequence[S]) -> Iterator[tuple[S, States]]:
        return ((stop, stop.states) for stop in stops)

    def settle(self) -> None: ...


class MappedMemory:
    """In a file that is mapped into memory: the operating system writes pages out when memory is short and reads them
    when they are needed, without any swap. The file has no name, so it is gone with the process, however that ends.

    Args:
        folder: where the file goes; None: see :func:`page_folder`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = page_folder(folder)
        self._maps: list[tuple[int, mmap.mmap]] = []  # address and map

    def zeros(self, specs: Sequence[Spec]) -> list[Tensor]:
        """
        Raises:
            ConfigError: the folder cannot be written, or has no room.
        """
        starts, size = [], 0
        for n, dtype in specs:
            starts.append(size)
            size += -(-n * dtype.itemsize // _ALIGNED) * _ALIGNED
        if not size:
            return [torch.zeros(n, dtype=dtype) for n, dtype in specs]
        pages = self._map(size)
        tensors = [
            torch.frombuffer(pages, dtype=dtype, count=n, offset=start) if n else torch.zeros(0, dtype=dtype)
            for (n, dtype), start in zip(specs, starts, strict=True)
        ]
        self._maps.append((torch.frombuffer(pages, dtype=torch.uint8).data_ptr(), pages))
        return tensors

    def _map(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self.folder, prefix="deltaw-pages-") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(
                        file.fileno(), 0, size
                    )  # a full disk is an error here, a crash at the first write
                else:
                    file.truncate(size)
                return mmap.mmap(file.fileno(), size)  # shared with the file, which it keeps open
        except OSError as error:
            raise ConfigError(
                f"paging {size / 2**20:,.0f} MiB of optimizer states to {str(self.folder)!r}: {error.strerror}; "
                "give page_dir= a folder on a disk with room"
            ) from error

    def visit(self, stops: Sequence[S]) -> Iterator[tuple[S, States]]:
        for i, stop in enumerate(stops):
            for tensor in stops[i + 1].states if i + 1 < len(stops) else ():
                self._read_ahead(tensor)
            yield stop, stop.states

    def _read_ahead(self, tensor: Tensor) -> None:
        """Asks the system to read the pages of ``tensor`` now; returns at once."""
        if not hasattr(mmap, "MADV_WILLNEED") or not tensor.nbytes:
            return
        for address, pages in self._maps:
            start = tensor.data_ptr() - address
            if 0 <= start < len(pages):
                first = start // mmap.PAGESIZE * mmap.PAGESIZE
                pages.madvise(mmap.MADV_WILLNEED, first, start + tensor.nbytes - first)

    def settle(self) -> None: ...


class PinnedMemory:
    """In pinned memory of the host, copied to the GPU one stop ahead on a stream of its own, and back after the update.

    Args:
        device: where states are updated; with a device other than CUDA nothing is pinned and nothing runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def zeros(self, specs: Sequence[Spec]) -> list[Tensor]:
        pinned = self._side is not None
        return [torch.zeros(n, dtype=dtype, pin_memory=pinned) for n, dtype in specs]

    def visit(self, stops: Sequence[S]) -> Iterator[tuple[S, States]]:
        ahead = self._fetch(stops[0]) if stops else ((), None)
        for i, stop in enumerate(stops):
            here, arrived = ahead
            ahead = self._fetch(stops[i + 1]) if i + 1 < len(stops) else ((), None)
            if arrived is not None:
                main = torch.cuda.current_stream(self.device)
                main.wait_event(arrived)
                for tensor in here:
                    tensor.record_stream(main)  # its memory is not given away before the update has run
            yield stop, here
            self._write_back(stop.states, here)

    def _aside(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _fetch(self, stop: Stop) -> tuple[States, Any]:
        with self._aside():
            copies = tuple(t.to(self.device, non_blocking=True, copy=True) for t in stop.states)
            return copies, self._side.record_event() if self._side is not None else None

    def _write_back(self, kept: States, written: States) -> None:
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with self._aside():
            for host, copy in zip(kept, written, strict=True):
                host.copy_(copy, non_blocking=True)

    def settle(self) -> None:
        if self._side is not None:
            self._side.synchronize()


def mapped_loads(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[object]:
    """Inside the block ``torch.load`` maps files instead of reading them into memory, and shares their pages, which
    count for no limit. What it gives must be copied: writing it would write the file.

    Args:
        path: the file; one that cannot be opened for writing is read as ever.
    """
    if not (hasattr(mmap, "MAP_SHARED") and os.access(path, os.W_OK)):
        return contextlib.nullcontext()
    return load_config.patch(  # type: ignore[attr-defined]
        {"load.mmap": True, "load.mmap_flags": mmap.MAP_SHARED}
    )


def page_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder for paged states: ``folder``, or the first place for temporary files that is on a disk (a file on a
    tmpfs is memory, and would free none).

    Raises:
        ConfigError: ``folder`` is not there.
    """
    if folder is not None:
        if not Path(folder).is_dir():
            raise ConfigError(f"page_dir = {str(folder)!r} is no folder: make it, or name another")
        return Path(folder)
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    there = [place for place in places if place.is_dir() and os.access(place, os.W_OK)]
    on_disk = next((place for place in there if not _in_memory(place)), None)
    if on_disk is None:
        log.warning(
            "optimizer states are paged to %s, which is memory itself: give page_dir= a folder on disk", places[0]
        )
    return on_disk or places[0]


def _in_memory(place: Path) -> bool:
    """Whether files in ``place`` are kept in memory, as far as the system tells."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    where = str(place.resolve())
    holding = [(len(at), kind) for _, at, kind, *_ in mounts if where == at or where.startswith(at.rstrip("/") + "/")]
    longest = max((length for length, _ in holding), default=0)
    return any(kind in _IN_MEMORY for length, kind in holding[::-1] if length == longest)
