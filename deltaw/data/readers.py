"""One file -> its rows, one at a time, each with its line; a place that holds no row comes as a fault among them.

Knows nothing of folders, splits by name or what rows mean. Everything but a JSON object is read in constant memory.
Text is read by the standard library, parquet by pyarrow.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from deltaw.data.rows import Fault, Row, from_columns
from deltaw.errors import DataError, MissingExtra

__all__ = ["SUFFIXES", "Reading", "read_file"]

Reading = Iterator[Row | Fault]

_CHUNK = 1 << 20  # characters of a JSON list read at a time
_EDGE = 16  # a literal or an escape that the end of the window has cut is shorter


def read_file(path: Path, split: str | None = None, *, whole: bool = True) -> Reading:
    """The rows of a file in their order, and its faults.

    Args:
        path: .jsonl, .ndjson, .json (a list of objects, or an object of lists), .csv or .parquet.
        split: the list to take from a JSON object.
        whole: whether a file may be read at once where nothing else can be done (a JSON object).

    Raises:
        DataError: at the first row that is asked for, where the file as a whole cannot be read.
        MissingExtra: a parquet file, without pyarrow.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{str(path)!r} is of no kind that can be read: {sorted(_READERS)}")
    try:
        if reader is _read_json:
            yield from _read_json(path, split, whole)
        else:
            yield from reader(path)
    except UnicodeDecodeError as error:
        yield Fault(str(path), f"it is not UTF-8 text: {error}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Reading:
    name = str(path)
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                row = json.loads(line)
            except UnicodeDecodeError as error:
                yield Fault(f"{name}:{number}", f"it is not UTF-8 text: {error}")
            except (json.JSONDecodeError, RecursionError) as error:
                yield Fault(f"{name}:{number}", str(error))
            else:
                yield Row(row, name, number) if isinstance(row, dict) else _no_object(name, number, row)


def _no_object(name: str, number: int, value: Any) -> Fault:
    return Fault(f"{name}:{number}", f"a {type(value).__name__}, not an object")


def _read_json(path: Path, split: str | None, whole: bool) -> Reading:
    name = str(path)
    with path.open(encoding="utf-8-sig") as file:
        window = _Window(file)
        opening = window.peek()
        try:
            if opening == "[":
                for number, row in window.elements():
                    yield Row(row, name, number) if isinstance(row, dict) else _no_object(name, number, row)
                return
        except json.JSONDecodeError as error:
            yield Fault(f"{name}:{window.line_of(error.pos)}", error.msg)
            return
        except RecursionError:
            yield Fault(f"{name}:{window.line}", "nested too deeply")
            return
    if not whole:
        raise DataError(f"{name} is no list of objects, so it cannot be read while training: write it as .jsonl")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = " (one object a line? then name it .jsonl)" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: {error}{hint}") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; it must be a list of objects")
    rows = _list_in(path, content, split)
    for number, row in enumerate(rows, 1):
        yield Row(row, name, number) if isinstance(row, dict) else _no_object(name, number, row)


def _list_in(path: Path, content: Mapping[str, Any], split: str | None) -> list[Any]:
    """The list in a JSON object: the one named after the split, or the only one."""
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    wanted = split or "train"
    if wanted in lists:
        return lists[wanted]
    if len(lists) == 1 and split in (None, "train", path.stem):
        return next(iter(lists.values()))
    raise DataError(f"{path} is an object with the lists {sorted(lists)}; none is the split {wanted!r}")


class _Window:
    """A JSON text of any size, of which only a window is in memory."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.text = ""
        self.at = 0
        self.line = 1
        self.ended = False
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            start = self.at
            while start < len(self.text) and self.text[start].isspace():
                start += 1
            self._move(start)
            if start < len(self.text):
                return self.text[start]
            if self.ended:
                return ""
            self._grow()

    def elements(self) -> Iterator[tuple[int, Any]]:
        """The elements of the list that starts here, each with the line it starts on. Raises JSONDecodeError."""
        self._move(self.at + 1)
        if self.peek() == "]":
            self._move(self.at + 1)
        else:
            while True:
                self.peek()
                line = self.line
                yield line, self._element()
                closing = self.peek()
                if closing not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", self.text, self.at)
                self._move(self.at + 1)
                if closing == "]":
                    break
        if self.peek():
            raise json.JSONDecodeError("Extra data", self.text, self.at)

    def line_of(self, position: int) -> int:
        """The line of a position in the window."""
        return self.line + self.text.count("\n", self.at, position)

    def _element(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _EDGE
                if self.ended or not cut:
                    raise
            else:
                if end < len(self.text) or self.ended:  # a number at the edge may go on
                    self._move(end)
                    return value
            self._grow()

    def _move(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _grow(self) -> None:
        """Forget what was read, and read on: as much again where one element fills the window."""
        rest = self.text[self.at :]
        new = self.file.read(max(_CHUNK, len(rest)))
        self.text, self.at, self.ended = rest + new, 0, not new


def _read_csv(path: Path) -> Reading:
    name = str(path)
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of 128 KiB, which a document easily is
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=False)
        header: list[str] | None = None
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Fault(f"{name}:{number}", str(error))
                continue
            if not cells:
                continue
            if header is None:
                header = cells
                if doubled := sorted({column for column in header if header.count(column) > 1}):
                    raise DataError(f"{name}:{number}: the header names {doubled} more than once")
            elif len(cells) != len(header):
                yield Fault(f"{name}:{number}", f"not {len(header)} cells, as the header has")
            else:
                yield Row(dict(zip(header, cells, strict=True)), name, number)


def _read_parquet(path: Path) -> Reading:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", "reading a parquet file") from error
    name, number = str(path), 0
    try:
        with parquet.ParquetFile(path) as file:
            read = from_columns(_classes(file.schema_arrow.metadata))
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(read(row), name, number)
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # what it raises on damaged bytes
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of classes that `datasets` writes into the files of the hub."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {column: kind["names"] for column, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, AttributeError, TypeError):
        return {}


_READERS = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
SUFFIXES = frozenset(_READERS)
