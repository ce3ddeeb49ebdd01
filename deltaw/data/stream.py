"""Rows read while training, for data that does not fit in memory: in constant memory, in an order that a seed decides.

Knows nothing of models. `StreamedRows` reads; `StreamedExamples` renders what it reads, for a data loader.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from deltaw.data.formats import detect_format
from deltaw.data.load import locate
from deltaw.data.render import Rendered, RenderSettings, render_examples
from deltaw.data.rows import Fault, Row, where
from deltaw.errors import DataError

__all__ = ["StreamedExamples", "StreamedRows", "is_stream"]


class StreamedRows(Iterable[Row]):
    """The rows of files, folders, globs or hub data sets, read anew at each iteration.

    One iteration is one pass: every row once, in an order that is a function of (seed, epoch). Files are taken in a
    drawn order; several sources are read at once, each in proportion to its bytes, so that none comes in a block; and
    a buffer of rows is kept from which the next one is drawn. Memory is that buffer and one row of each source.

    Args:
        name: as in `load_rows`; of several, all rows of all.
        split: as in `load_rows`.
        seed: of the order; None reads in the order of the files.
        buffer_size: rows that the order is drawn among.

    Raises:
        DataError: nothing there; and, while it is iterated, the first broken row, as file:line.
    """

    def __init__(
        self, name: str | Sequence[str], split: str | None = None, *, seed: int | None = 0, buffer_size: int = 2048
    ) -> None:
        if buffer_size < 1:
            raise DataError(f"buffer_size must be at least 1, not {buffer_size}")
        self.names = [name] if isinstance(name, str) else list(name)
        self.sources = [locate(one, split, streaming=True) for one in self.names]
        self.seed = seed
        self.buffer_size = buffer_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which pass the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        if self.seed is None:
            return itertools.chain.from_iterable(self._read(i, None) for i in range(len(self.sources)))
        rng = random.Random(f"{self.seed} {self.epoch}")
        return _shuffled(self._merged(rng), self.buffer_size, rng)

    def head(self, count: int) -> list[Row]:
        """The first rows in the order of the files, some of each source: what can be checked before training."""
        each = -(-count // len(self.sources))
        rows = [row for i in range(len(self.sources)) for row in itertools.islice(self._read(i, None), each)]
        if not rows:
            raise DataError(f"{', '.join(map(repr, self.names))} holds no rows")
        return rows[:count]

    def fingerprint(self) -> str:
        """Of what the rows are read from, without reading them all."""
        return hashlib.sha256(" ".join(source.fingerprint() for source in self.sources).encode()).hexdigest()

    def _read(self, index: int, rng: random.Random | None) -> Iterator[Row]:
        parts = self.sources[index].parts()
        if rng is not None:
            rng.shuffle(parts)
        for part in parts:
            for item in part:
                if isinstance(item, Fault):
                    raise DataError(f"broken row at {item}")
                yield item

    def _merged(self, rng: random.Random) -> Iterator[Row]:
        """All sources at once: the next row comes from each as often as it is large."""
        readings = [self._read(i, rng) for i in range(len(self.sources))]
        sizes = [max(source.size, 1) for source in self.sources]
        while len(readings) > 1:
            [at] = rng.choices(range(len(readings)), sizes)
            row = next(readings[at], None)
            if row is None:
                del readings[at], sizes[at]
            else:
                yield row
        yield from readings[0]


def is_stream(rows: Any) -> bool:
    """Whether rows have no length and can be iterated again, as a `StreamedRows` or a streamed data set of the hub."""
    return isinstance(rows, Iterable) and not hasattr(rows, "__len__") and iter(rows) is not rows


def _shuffled(rows: Iterable[Row], size: int, rng: random.Random) -> Iterator[Row]:
    """Each row in the place of one that is drawn from the buffer; at the end the buffer itself."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        at = rng.randrange(size)
        yield buffer[at]
        buffer[at] = row
    rng.shuffle(buffer)
    yield from buffer


class StreamedExamples(IterableDataset[dict[str, list[int]]]):
    """Token ids and labels, rendered while they are asked for, pass after pass.

    The workers of a data loader share the rendering so that the batches are the same whatever their number: batch k
    is made by worker k modulo the number of workers, which is also whom the loader asks for it. All workers read all
    rows, and render those of their own batches (and those that may give none or several examples, to count them).

    It never ends, unless `passes` says so: a run takes as many steps as ``max_steps``, and going on from step N is
    skipping N batches, which is what transformers' Trainer does, also where N lies beyond the first pass.

    Args:
        rows: a `StreamedRows`, or anything that can be iterated again; ``set_epoch`` is called before each pass.
        tokenizer: a transformers tokenizer.
        settings: how rows become tokens.
        batch_size: examples of a batch of the loader.
        passes: how often the rows are read; None without end.
        allow: findings of the check that shall not stop the stream: ``truncated-answer``, ``answer-cut-away``,
            ``no-supervised-token``.

    Raises:
        DataError: a row that cannot be rendered, or learned from, by its file and line; a pass without examples.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        settings: RenderSettings,
        *,
        batch_size: int = 1,
        passes: int | None = None,
        allow: Collection[str] = (),
    ) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.settings = settings
        self.batch_size = batch_size
        self.passes = passes
        self.allow = frozenset(allow)

    def in_batches(self, size: int) -> StreamedExamples:
        """The same stream, for batches of so many examples."""
        changed = copy.copy(self)
        changed.batch_size = size
        return changed

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        position = 0  # of the next example, over all passes
        for epoch in itertools.count() if self.passes is None else range(self.passes):
            if set_epoch := getattr(self.rows, "set_epoch", None):
                set_epoch(epoch)
            begin = position
            for index, row in enumerate(self.rows):
                if position // self.batch_size % workers != mine and self._gives_one(row):
                    position += 1
                    continue
                for example in self._render(row, index):
                    if position // self.batch_size % workers == mine:
                        yield example.as_features()
                    position += 1
            if position == begin:
                raise DataError("the stream gives no examples: it has no rows, or all are too long and dropped")

    def _gives_one(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is exactly one example, which is known without rendering it."""
        if self.settings.overlong == "drop":
            return False
        kind = self.settings.dataset_format
        return (detect_format(row, self.settings.text_field) if kind == "auto" else kind) != "text"

    def _render(self, row: Mapping[str, Any], index: int) -> list[Rendered]:
        try:
            examples = render_examples(row, self.tokenizer, self.settings)
            for example in examples:
                self._require_learnable(example)
        except DataError as error:
            raise DataError(f"{where(row, index)}: {error}") from error
        return examples

    def _require_learnable(self, example: Rendered) -> None:
        """What the check finds in examples that it has, of one that it never saw."""
        cut, supervised = example.cut_supervised, example.supervised
        name = "truncated-answer" if cut and supervised else "answer-cut-away" if cut else "no-supervised-token"
        if name in self.allow or (not cut and supervised) or (cut and supervised and self.settings.overlong != "error"):
            return
        if cut:
            raise DataError(
                f"its {example.length_before_truncation} tokens are more than max_length={self.settings.max_length}, "
                f"which cuts its answer: raise it, or choose overlong [{name}]"
            )
        raise DataError(f"it has no supervised token, so nothing would be learned from it [{name}]")
