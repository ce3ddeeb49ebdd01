"""One pass over the tokens: what a check must know of each example, in flat arrays. Knows nothing of what is a fault.

A million examples take seconds and bounded memory: tokens are read (from disk, where they are mapped) a million at a
time, and what is kept of each example is some numbers and three hashes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields

import numpy as np

from deltaw.data.tokens import TokenDataset

__all__ = ["Facts", "Vocabulary", "facts_of"]

_AT_ONCE = 1 << 20  # tokens


@dataclass(frozen=True)
class Vocabulary:
    """What single token ids are.

    Attributes:
        stops: at which generation stops.
        special: all special tokens, the stops among them.
        blank: special tokens and white space: an answer of these says nothing.
        bos: the token at the beginning, if there is one.
    """

    stops: Collection[int]
    special: Collection[int]
    blank: Collection[int]
    bos: int | None = None


@dataclass(frozen=True)
class Facts:
    """Of each example, (n,) each. A run is a stretch of supervised tokens: an answer, or a whole text.

    Attributes:
        lengths: tokens.
        supervised: supervised tokens.
        lowest, highest: of its ids.
        runs: how many.
        open_runs: runs that end without any special token.
        odd_runs: runs that end with a special token at which generation does not stop.
        empty_runs: runs of nothing but white space and special tokens.
        bos: how many of its first two tokens are BOS, counted from the start.
        prompt_length: tokens before the last run.
        whole, prompt, answer: 64-bit hashes of all tokens, of those before the last run, and of the last run.
    """

    lengths: np.ndarray
    supervised: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    runs: np.ndarray
    open_runs: np.ndarray
    odd_runs: np.ndarray
    empty_runs: np.ndarray
    bos: np.ndarray
    prompt_length: np.ndarray
    whole: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray


def facts_of(dataset: TokenDataset, vocabulary: Vocabulary) -> Facts:
    """Facts of every example. What cutting took from an example, its missing end for one, is not held against it."""
    n = len(dataset)
    hashes = ("whole", "prompt", "answer")
    arrays = {f.name: np.zeros(n, np.uint64 if f.name in hashes else np.int64) for f in fields(Facts)}
    # a document cut into blocks ends with its last block; an example that was cut ends nowhere
    unfinished = np.asarray(dataset.lost) > 0
    unfinished[:-1] |= dataset.rows[1:] == dataset.rows[:-1]
    for first, last in _stretches(dataset.offsets):
        begin, end = int(dataset.offsets[first]), int(dataset.offsets[last])
        lengths = np.diff(dataset.offsets[first : last + 1])
        arrays["lengths"][first:last] = lengths
        filled = np.flatnonzero(lengths)  # reduceat knows no empty segments
        if len(filled):
            ids, mask = np.asarray(dataset.ids[begin:end], np.int64), np.asarray(dataset.supervised[begin:end])
            found = _facts(ids, mask, lengths[filled], unfinished[first:last][filled], vocabulary)
            for name, values in found.items():
                arrays[name][first + filled] = values
    return Facts(**arrays)


def _stretches(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of examples that hold about `_AT_ONCE` tokens, at least one example each."""
    first, n = 0, len(offsets) - 1
    while first < n:
        last = int(np.searchsorted(offsets, offsets[first] + _AT_ONCE, side="right")) - 1
        last = min(max(last, first + 1), n)
        yield first, last
        first = last


def _facts(
    ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray, unfinished: np.ndarray, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """The same for examples that have at least one token each; ids and mask are (t,), the others (m,)."""
    m, t = len(lengths), len(ids)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    position = np.arange(t) - np.repeat(starts, lengths)

    run_starts, run_ends = mask.copy(), mask.copy()
    run_starts[1:] &= ~mask[:-1]
    run_starts[starts] = mask[starts]
    run_ends[:-1] &= ~mask[1:]
    run_ends[ends - 1] = mask[ends - 1]
    at_start, at_end = np.flatnonzero(run_starts), np.flatnonzero(run_ends)  # one of each a run, in order
    of = np.searchsorted(starts, at_start, side="right") - 1  # the example of each run
    runs = np.bincount(of, minlength=m)
    last = np.ones(len(of), bool)  # whether a run is the last of its example
    last[:-1] = of[1:] != of[:-1]

    closing = ids[at_end]
    special, stops = _among(closing, vocabulary.special), _among(closing, vocabulary.stops)
    finished = ~(last & unfinished[of])
    said = np.concatenate([[0], np.cumsum(mask & ~_among(ids, vocabulary.blank))])
    empty = said[at_end + 1] == said[at_start]

    final = np.full(m, t, np.int64)  # where the last run starts, within the stretch
    final[of[last]] = at_start[last]
    has_run = runs > 0
    prompt_length = np.where(has_run, final - starts, lengths)
    start_of = np.repeat(prompt_length, lengths)
    mixed = _mix(ids, position)
    before = position < start_of
    # the same answer after a longer prompt is the same answer: its positions count from its own start
    answer = np.where(mask & ~before, _mix(ids, position - start_of), np.uint64(0))
    begins = _among(ids, [] if vocabulary.bos is None else [vocabulary.bos])
    second = np.zeros(m, bool)
    second[lengths > 1] = begins[starts[lengths > 1] + 1]
    return {
        "supervised": np.add.reduceat(mask, starts, dtype=np.int64),
        "lowest": np.minimum.reduceat(ids, starts),
        "highest": np.maximum.reduceat(ids, starts),
        "runs": runs,
        "open_runs": np.bincount(of, weights=finished & ~special, minlength=m).astype(np.int64),
        "odd_runs": np.bincount(of, weights=finished & special & ~stops, minlength=m).astype(np.int64),
        "empty_runs": np.bincount(of, weights=empty, minlength=m).astype(np.int64),
        "bos": begins[starts].astype(np.int64) + (begins[starts] & second),
        "prompt_length": prompt_length,
        "whole": np.add.reduceat(mixed, starts),
        "prompt": np.add.reduceat(np.where(before, mixed, np.uint64(0)), starts),
        "answer": np.add.reduceat(answer, starts),
    }


def _among(ids: np.ndarray, wanted: Collection[int]) -> np.ndarray:
    """(t,) bool: by a table, as there are few wanted ids and many tokens."""
    table = np.zeros(max(wanted, default=0) + 2, bool)  # the last place is for all that are greater
    table[list(wanted)] = True
    return table[np.where((ids < 0) | (ids >= len(table)), len(table) - 1, ids)]


def _mix(ids: np.ndarray, position: np.ndarray) -> np.ndarray:
    """(t,) uint64: a well-stirred number for an id at a position (the finaliser of SplitMix64, Steele et al. 2014).

    The sum over an example is its hash; the order of its tokens is in the positions.
    """
    with np.errstate(over="ignore"):
        x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + (position.astype(np.uint64) + np.uint64(1)) * (
            np.uint64(0xD1342543DE82EF95)
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
