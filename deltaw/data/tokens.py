"""Examples as tokens: many in few flat arrays, which may be mapped from a file. Knows nothing of text or tokenizers.

A list of Python lists costs about 36 bytes a token; these arrays cost five, and none of them while they are mapped from
disk and not read. A label is the token itself where the loss covers it, so a mask holds all labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.data.render import IGNORE, Rendered

__all__ = ["TokenDataset"]


@dataclass(frozen=True, eq=False)
class TokenDataset(Sequence[dict[str, list[int]]]):
    """A map-style data set of token ids and labels, for any data loader.

    Attributes:
        ids: (tokens,) int32, example after example.
        supervised: (tokens,) bool, where the loss is taken.
        offsets: (n + 1,) int64, where each example starts; the last is the number of tokens.
        uncut: (n,) int32, tokens of each example before anything was cut.
        lost: (n,) int32, supervised tokens that cutting took from it.
        rows: (n,) int64, the row each example came from: rows that were dropped are missing, long documents repeat.
        dropped: rows that were left out because they were too long.
        fingerprint: of data, tokenizer, template and options together; "" when it was not asked for.
    """

    ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    uncut: np.ndarray
    lost: np.ndarray
    rows: np.ndarray
    dropped: int = 0
    fingerprint: str = ""

    @classmethod
    def of(cls, examples: Iterable[Rendered], rows: Sequence[int] | None = None, *, dropped: int = 0) -> TokenDataset:
        """The examples in arrays.

        Args:
            examples: in their order.
            rows: the row of each; counted from zero when None.
            dropped: see above.
        """
        listed = list(examples)
        ids = [np.asarray(one.input_ids, np.int32) for one in listed]
        masks = [np.asarray(one.labels, np.int64) != IGNORE for one in listed]
        offsets = np.zeros(len(listed) + 1, np.int64)
        np.cumsum([len(one) for one in ids], out=offsets[1:])
        return cls(
            ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
            supervised=np.concatenate(masks) if masks else np.zeros(0, bool),
            offsets=offsets,
            uncut=np.array([one.length_before_truncation for one in listed], np.int32),
            lost=np.array([one.cut_supervised for one in listed], np.int32),
            rows=np.arange(len(listed)) if rows is None else np.asarray(rows, np.int64),
            dropped=dropped,
        )

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each example."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return int(self.offsets[-1])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        """``{"input_ids": [...], "labels": [...]}`` of one example; a slice gives a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids, supervised = self.arrays(int(index))
        return {"input_ids": ids.tolist(), "labels": np.where(supervised, ids, IGNORE).tolist()}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[i] for i in range(len(self)))

    def arrays(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (t,) int32 and mask (t,) bool of one example, as views."""
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"example {index} of {n}")
        index %= n
        where = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.ids[where], self.supervised[where]

    def rendered(self, index: int) -> Rendered:
        """One example as the renderer made it."""
        example = self[index]
        return Rendered(example["input_ids"], example["labels"], int(self.uncut[index]), int(self.lost[index]))
