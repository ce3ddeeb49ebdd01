"""Rows -> tokens, in chunks and by several processes, in bounded memory. Knows nothing of how one row is rendered.

The result depends on neither the number of processes nor the size of the chunks: rows keep their order.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from deltaw.data.cache import TokenCache, tokens_fingerprint
from deltaw.data.render import DEFAULT_SETTINGS, RenderSettings, render_examples
from deltaw.data.rows import Unrendered
from deltaw.data.tokenfiles import MEMORY, TokenWriter
from deltaw.data.tokens import TokenDataset
from deltaw.errors import DataError
from deltaw.held import Hold, new_folder, remove_unheld
from deltaw.workers import WorkersFailed, WorkersUnfit, map_in_processes

__all__ = ["tokenize_rows"]

log = logging.getLogger("deltaw")
Progress = Callable[[int, int | None], object]

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 1 << 20  # of a chunk's texts, about: long documents make short chunks
ROW_WORK = 500  # a row costs about as much as so many characters
PROCESS_WORK = 6_500_000  # characters, or rows for them, that are done before another process has started
MOST_PROCESSES = 16  # by then this one has enough to do with handing out rows
_SCRATCH = "deltaw-tokens-"
_LOCAL_RANKS = "LOCAL_WORLD_SIZE"
#: each process has one core, and so its libraries one thread
PROCESS_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    settings: RenderSettings = DEFAULT_SETTINGS,
    *,
    workers: int | None = None,
    cache: bool | str | Path | TokenCache | None = None,
    progress: Progress | None = None,
) -> TokenDataset:
    """Token ids and labels of all rows: those of ``render_examples``, row after row.

    Many tokens go to files as they are made, and are mapped from there: in the cache, or else in a folder of the
    system's for temporary files, which is removed with the data set (or, if this process is killed, by the next one).

    Args:
        rows: a sequence, or any iterable; one that can be iterated only once cannot be looked up in the cache.
        tokenizer: a transformers tokenizer.
        settings: see `RenderSettings`.
        workers: processes; None: as many as help, which for few rows is this one alone.
        cache: keep the tokens for the next call with the same content: True for deltaw's own folder, or a folder, or a
            :class:`TokenCache`.
        progress: called now and then with the number of rows done, and of all rows if that is known.

    Raises:
        DataError: one error for all bad rows: how many they are, and what is wrong with the first five.
    """
    total = len(rows) if hasattr(rows, "__len__") else None  # type: ignore[arg-type]
    tell = progress or (lambda done, total: None)
    kept = _cache(cache, rows)
    fingerprint = ""
    if kept is not None:
        fingerprint = tokens_fingerprint(rows, tokenizer, settings)
        found = kept.get(fingerprint)
        if found is not None:
            log.info("tokens from the cache, made %s", found.made)
            seen = int(found.rows[-1]) + 1 if total is None and len(found) else total or 0
            tell(seen, total)
            return found
    work = _Renderer(tokenizer, settings)
    faults, done = Unrendered(), 0
    with (
        TokenWriter(_scratch if kept is None else kept.new_folder, MEMORY if kept is None else 0) as writer,
        closing(_parts(work, rows, workers)) as parts,  # whatever happens, its processes end here
    ):
        for part in parts:
            done += part.rows
            faults.join(part.faults)
            if not faults.count:
                writer.add(part.tokens)
            tell(done, total)
        faults.raise_if_any(done)
        tokens = writer.finish(fingerprint)
    return tokens if kept is None else kept.keep(tokens)


# --- chunks -------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    first: int  # index of its first row
    rows: list[Mapping[str, Any]]
    work: int  # about, in characters


class _Part(NamedTuple):
    """A chunk, rendered."""

    rows: int
    tokens: TokenDataset
    faults: Unrendered


@dataclass(frozen=True)
class _Renderer:
    """Chunk -> part. Picklable, if the tokenizer is."""

    tokenizer: Any
    settings: RenderSettings

    def __call__(self, chunk: _Chunk) -> _Part:
        examples, numbers, faults, dropped = [], [], Unrendered(), 0
        for number, row in enumerate(chunk.rows, chunk.first):
            try:
                made = render_examples(row, self.tokenizer, self.settings)
            except DataError as error:
                faults.add(row, number, error)
                continue
            dropped += not made
            examples += made
            numbers += [number] * len(made)
        return _Part(len(chunk.rows), TokenDataset.of(examples, numbers, dropped=dropped), faults)


def _chunks(rows: Iterable[Mapping[str, Any]]) -> Iterator[_Chunk]:
    first, held, characters = 0, [], 0
    for row in rows:
        held.append(row)
        characters += _characters(row)
        if len(held) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield _Chunk(first, held, characters + ROW_WORK * len(held))
            first, held, characters = first + len(held), [], 0
    if held:
        yield _Chunk(first, held, characters + ROW_WORK * len(held))


def _characters(value: Any, depth: int = 3) -> int:
    """Of the strings in a row, down to the contents of its messages."""
    if isinstance(value, str):
        return len(value)
    if depth and isinstance(value, Mapping):
        return sum(_characters(item, depth - 1) for item in value.values())
    if depth and isinstance(value, list | tuple):
        return sum(_characters(item, depth - 1) for item in value)
    return 0


def _parts(work: _Renderer, rows: Iterable[Mapping[str, Any]], workers: int | None) -> Generator[_Part]:
    chunks = _chunks(rows)
    if workers is None:
        workers, chunks = _as_many_as_help(chunks)
    if workers > 1:
        try:
            yield from map_in_processes(work, chunks, workers, PROCESS_ENVIRONMENT)
            return
        except WorkersUnfit as error:  # raised before the first chunk is taken
            log.warning("one process tokenizes, not %d: %s", workers, error)
        except WorkersFailed as error:
            raise DataError(
                f"{error}; use fewer of the {workers} processes that tokenize: dataset_num_proc: 1"
            ) from error
    yield from map(work, chunks)


def _as_many_as_help(chunks: Iterator[_Chunk]) -> tuple[int, Iterator[_Chunk]]:
    """How many processes are worth their start, seen from the first chunks; and all chunks."""
    most = min(_cores(), MOST_PROCESSES)
    head, found = [], 0
    while most > 1 and found < most * PROCESS_WORK:
        chunk = next(chunks, None)
        if chunk is None:
            break
        head.append(chunk)
        found += chunk.work
    return max(1, min(most, found // PROCESS_WORK)), chain(head, chunks)


# --- where it runs, and where it goes ------------------------------------------------------------------------------


def _cores() -> int:
    """Cores for this process, when each rank of this machine tokenizes."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // max(1, int(os.environ.get(_LOCAL_RANKS) or 1)))


def _cache(cache: bool | str | Path | TokenCache | None, rows: Iterable[Any]) -> TokenCache | None:
    if cache is None or cache is False:
        return None
    if iter(rows) is rows:
        log.warning("the rows can be read only once, so that their tokens are not cached")
        return None
    kept = cache if isinstance(cache, TokenCache) else TokenCache(None if cache is True else cache)
    try:
        kept.folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(kept.folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        log.warning("%s cannot be written to, so that no tokens are cached", kept.folder)
        return None
    return kept


def _scratch() -> Hold:
    """A folder for this data set alone, beside which none of a killed process is left."""
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{_SCRATCH}*"):
        remove_unheld(left)
    return new_folder(parent, _SCRATCH, mode=0o700)
