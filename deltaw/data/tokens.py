"""Examples as tokens: many in few flat arrays, which may be mapped from files. Knows nothing of text or tokenizers.

A list of Python lists costs about 36 bytes a token; these arrays cost five, and none of them while they are mapped from
disk and not read. A label is the token itself where the loss covers it, so a mask holds all labels.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.data.render import IGNORE, Rendered
from deltaw.errors import DataError
from deltaw.held import Hold, hold

__all__ = ["COLUMNS", "FORMAT", "MARKER", "TokenDataset"]

#: the arrays of a data set, and so its files: name -> type of the elements
COLUMNS = {
    "ids": np.dtype("<i4"),
    "supervised": np.dtype("?"),
    "offsets": np.dtype("<i8"),
    "uncut": np.dtype("<i4"),
    "lost": np.dtype("<i4"),
    "rows": np.dtype("<i8"),
    "escaped": np.dtype("<i4"),
}
MARKER = "tokens.json"  # written last: a folder without it is not complete
FORMAT = 1  # of these files


@dataclass(frozen=True)
class _Mapped:
    """The files that a data set was opened from."""

    held: Hold
    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class TokenDataset(Sequence[dict[str, list[int]]]):
    """A map-style data set of token ids and labels, for any data loader.

    One that is mapped from files (:meth:`open`) is read-only, and is pickled as the name of its folder: the workers of
    a data loader open it again, and share its memory.

    Attributes:
        ids: (tokens,) int32, example after example.
        supervised: (tokens,) bool, where the loss is taken.
        offsets: (n + 1,) int64, where each example starts; the last is the number of tokens.
        uncut: (n,) int32, tokens of each example before anything was cut.
        lost: (n,) int32, supervised tokens that cutting took from it.
        rows: (n,) int64, the row each example came from: rows that were dropped are missing, long documents repeat.
        escaped: (n,) int32, control tokens that its text spelled, and that were encoded as plain text; unset: none.
        dropped: rows that were left out because they were too long.
        fingerprint: of data, tokenizer, template and options together; "" when it was not asked for.
        made: when the tokens were made, if they come from the cache; else "".
    """

    ids: np.ndarray
    supervised: np.ndarray
    offsets: np.ndarray
    uncut: np.ndarray
    lost: np.ndarray
    rows: np.ndarray
    escaped: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    dropped: int = 0
    fingerprint: str = ""
    made: str = ""
    _mapped: _Mapped | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not len(self.escaped):
            object.__setattr__(self, "escaped", np.zeros(len(self), np.int32))

    @classmethod
    def of(cls, examples: Iterable[Rendered], rows: Sequence[int] | None = None, *, dropped: int = 0) -> TokenDataset:
        """The examples in arrays.

        Args:
            examples: in their order.
            rows: the row of each; counted from zero when None.
            dropped: see above.
        """
        listed = list(examples)
        offsets = np.zeros(len(listed) + 1, np.int64)
        np.cumsum([len(one.input_ids) for one in listed], out=offsets[1:])
        tokens = int(offsets[-1])
        labels = np.fromiter(chain.from_iterable(one.labels for one in listed), np.int32, tokens)
        return cls(
            ids=np.fromiter(chain.from_iterable(one.input_ids for one in listed), np.int32, tokens),
            supervised=labels != IGNORE,
            offsets=offsets,
            uncut=np.array([one.length_before_truncation for one in listed], np.int32),
            lost=np.array([one.cut_supervised for one in listed], np.int32),
            rows=np.arange(len(listed)) if rows is None else np.asarray(rows, np.int64),
            escaped=np.array([one.escaped for one in listed], np.int32),
            dropped=dropped,
        )

    @classmethod
    def open(cls, folder: str | Path, *, held: Hold | None = None) -> TokenDataset:
        """The data set in a folder that :class:`deltaw.data.tokenfiles.TokenWriter` wrote, mapped and read-only.

        Args:
            folder: where its files are.
            held: the hold on it, if the caller has one already; it then ends with the data set.

        Raises:
            DataError: the folder holds no complete data set of this format, or files of another size than it says.
        """
        folder = Path(folder)
        held = held or hold(folder)
        try:
            said = json.loads((folder / MARKER).read_text(encoding="utf-8"))
            if held is None or said["format"] != FORMAT:
                raise DataError(f"{folder} holds no token files of format {FORMAT}")
            n, tokens = int(said["examples"]), int(said["tokens"])
            sizes = {"ids": tokens, "supervised": tokens, "offsets": n + 1}
            arrays = {name: _map(folder, name, sizes.get(name, n)) for name in COLUMNS}
            counted = {"dropped": int(said["dropped"]), "fingerprint": str(said["fingerprint"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder} holds no complete token files: {error!r}") from error
        return cls(**arrays, **counted, _mapped=_Mapped(held, arrays))

    @property
    def folder(self) -> Path | None:
        """Where its files are, if it is mapped from files."""
        return None if self._mapped is None else self._mapped.held.folder

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

    def __reduce__(self) -> tuple[Any, ...]:
        mapped = self._mapped
        if mapped is not None and all(getattr(self, name) is array for name, array in mapped.arrays.items()):
            return _reopen, (str(mapped.held.folder), self.dropped, self.fingerprint, self.made)
        arrays = [getattr(self, name) for name in COLUMNS]
        return TokenDataset, (*arrays, self.dropped, self.fingerprint, self.made)

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
        told = (int(column[index]) for column in (self.uncut, self.lost, self.escaped))
        return Rendered(example["input_ids"], example["labels"], *told)


def _map(folder: Path, name: str, length: int) -> np.ndarray:
    """A file of elements as a read-only array (length,); nothing is read before it is looked at."""
    path, dtype = folder / f"{name}.bin", COLUMNS[name]
    size = path.stat().st_size
    if size != length * dtype.itemsize:
        raise DataError(f"{path} has {size:,} bytes and should have {length * dtype.itemsize:,}")
    if not size:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def _reopen(folder: str, dropped: int, fingerprint: str, made: str) -> TokenDataset:
    return replace(TokenDataset.open(folder), dropped=dropped, fingerprint=fingerprint, made=made)
