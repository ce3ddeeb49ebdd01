"""A name or a path -> rows. Knows nothing of what the rows mean.

Local files are read where they lie and never downloaded or copied; only a name that is no path on this machine goes
to the hub, through `datasets`, which honours HF_HUB_OFFLINE.
"""

from __future__ import annotations

import glob
import hashlib
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.data.readers import SUFFIXES, Reading, read_file
from deltaw.data.rows import Fault, Row, class_names, from_columns, raise_faults
from deltaw.data.stored import RowStore, joined, pick
from deltaw.errors import DataError, MissingExtra, did_you_mean

__all__ = ["Files", "Source", "Table", "draw", "load_rows", "locate", "read_all"]

_EDGE = 1 << 20  # bytes at each end of a file that count for its fingerprint


@dataclass(frozen=True)
class Files:
    """Files on this machine that together are one source of rows."""

    name: str
    paths: tuple[Path, ...]
    split: str | None = None

    def parts(self, whole: bool = False) -> list[Reading]:
        """A reading of each file, which starts when it is asked for rows."""
        return [read_file(path, self.split, whole=whole) for path in self.paths]

    @property
    def size(self) -> int:
        """Bytes on disk: how much of a stream comes from here."""
        return sum(path.stat().st_size for path in self.paths)

    def fingerprint(self) -> str:
        """Of names, sizes and both ends of each file; as good as reading all, and instant."""
        digest = hashlib.sha256(repr(self.split).encode())
        for path in self.paths:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size};".encode())
            with path.open("rb") as data:
                digest.update(data.read(_EDGE))
                data.seek(max(0, size - _EDGE))
                digest.update(data.read(_EDGE))
        return digest.hexdigest()


@dataclass(frozen=True)
class Table:
    """A `datasets` table, in memory or streamed from the hub."""

    name: str
    table: Any
    split: str | None = None

    def parts(self, whole: bool = False) -> list[Reading]:
        """One reading of the whole table."""
        return [self._read()]

    def _read(self) -> Reading:
        read = from_columns(class_names(self.table.features))
        for number, row in enumerate(self.table, 1):
            yield Row(read(row), self.name, number)

    @property
    def size(self) -> int:
        """Bytes, where the hub tells."""
        return int(getattr(self.table.info, "dataset_size", None) or 0)

    def fingerprint(self) -> str:
        """The name, the split and what the hub's files are."""
        info = self.table.info
        told = (self.name, self.split, str(info.version), repr(info.download_checksums), repr(info.splits))
        return hashlib.sha256(repr(told).encode()).hexdigest()


Source = Files | Table


def load_rows(
    name: str | Sequence[str], split: str | None = None, *, limit: int | None = None, seed: int = 0
) -> Sequence[Row]:
    """Rows of a file (.jsonl, .ndjson, .json, .csv, .parquet), a folder of such files, a glob, or a hub data set.

    Args:
        name: the file, the folder, the glob (``data/*.jsonl``) or the hub id; of several, all rows in turn.
        split: which part; "train" when None. In a folder the file is named after it (``train.jsonl``,
            ``train-00000-of-00002.parquet``, also within ``data/``); in a .json object it may be a key.
        limit: keep at most this many rows, drawn without replacement by `seed`, in their original order.
        seed: of that draw.

    Returns:
        A list, or where there are many rows a sequence that keeps them in a temporary file.

    Raises:
        DataError: nothing there (with the nearest names), no such split, or broken lines, each as file:line.
        MissingExtra: a parquet file or a hub id without the packages that read them.
    """
    names = [name] if isinstance(name, str) else list(name)
    rows = joined([read_all(locate(one, split)) for one in names])
    return rows if limit is None else draw(rows, limit, seed)


def draw(rows: Sequence[Any], limit: int, seed: int) -> Sequence[Any]:
    """At most `limit` of the rows, drawn without replacement by the seed, in their original order."""
    if limit < 1:
        raise DataError(f"limit must be at least 1, not {limit}")
    if limit >= len(rows):
        return rows
    return pick(rows, sorted(random.Random(seed).sample(range(len(rows)), limit)))


def read_all(source: Source) -> Sequence[Row]:
    """All rows of a source. Raises DataError for its faults, all at once, and where it has no rows."""
    store = RowStore()
    faults: list[Fault] = []
    for part in source.parts(whole=True):
        for item in part:
            if isinstance(item, Fault):
                faults.append(item)
            else:
                store.add(item)
    raise_faults(source.name, faults)
    rows = store.rows()
    if not rows:
        raise DataError(f"{source.name!r} holds no rows")
    return rows


def locate(name: str, split: str | None = None, *, streaming: bool = False) -> Source:
    """What a name means: a file, a folder, a glob, or a data set of the hub.

    Args:
        name, split: as `load_rows`.
        streaming: a data set of the hub is not downloaded, but read while it is iterated.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path, split)
    if path.is_file():
        return Files(name, (_readable(path, split),), split)
    if glob.has_magic(name):
        return _matches(name, split)
    if _looks_like_path(name):
        raise DataError(f"no data at {name!r}: {_nearest(path)}")
    return Table(name, _hub(name, split, streaming), split)


def _readable(path: Path, split: str | None) -> Path:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{str(path)!r} is of no kind that can be read: {sorted(SUFFIXES)}")
    # a plain file has no parts: giving all of it for "test" would quietly evaluate on the training rows
    if split not in (None, "train", path.stem) and path.suffix.lower() != ".json":
        raise DataError(f"{str(path)!r} is one file and has no split {split!r}: name the file of that split instead")
    return path


def _matches(name: str, split: str | None) -> Files:
    """The files of a glob, by name; all of them are one part."""
    if split not in (None, "train"):
        raise DataError(f"{name!r} is a glob and has no split {split!r}: name the files of that split instead")
    pattern = os.path.expanduser(name)
    found = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
    if not found:
        folder = Path(*[part for part in Path(pattern).parts if not glob.has_magic(part)])
        raise DataError(f"no file matches {name!r}: {_nearest(folder / Path(pattern).name)}")
    if unread := [str(path) for path in found if path.suffix.lower() not in SUFFIXES]:
        raise DataError(
            f"{name!r} matches files of no kind that can be read: {unread[:5]}; read are {sorted(SUFFIXES)}"
        )
    return Files(name, tuple(found))


def _folder(name: str, folder: Path, split: str | None) -> Source:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():  # save_to_disk
        saved = _datasets("reading a saved data set").load_from_disk(str(folder))
        return Table(name, _pick_split(saved, split, name) if isinstance(saved, Mapping) else saved, split)
    found = [
        file
        for place in (folder, folder / "data")
        if place.is_dir()
        for file in sorted(place.iterdir())
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    wanted = split or "train"
    pattern = re.compile(rf"{re.escape(wanted)}(-.*)?")
    chosen = [file for file in found if pattern.fullmatch(file.stem)]
    if not chosen and split in (None, "train") and len(found) == 1:
        chosen = found
    names = [file.name for file in found]
    if not chosen:
        raise DataError(
            f"folder {name!r} has no file for the split {wanted!r}"
            + (f"; data files there: {names[:10]}" if names else f"; it has no file of {sorted(SUFFIXES)}")
            + did_you_mean(wanted, [file.stem for file in found])
            + (f" (all of them: {name}/*{found[0].suffix})" if len(found) > 1 and split in (None, "train") else "")
        )
    if len({file.suffix.lower() for file in chosen}) > 1:
        same = [file.name for file in chosen]
        raise DataError(f"folder {name!r} has the split {wanted!r} in several kinds of file, {same}: name one of them")
    return Files(name, tuple(chosen))


def _hub(name: str, split: str | None, streaming: bool) -> Any:
    datasets = _datasets(f"reading the data set {name!r} from the hub")
    try:
        return datasets.load_dataset(name, split=split or "train", streaming=streaming)
    except Exception as error:  # the hub client raises errors of many libraries
        raise DataError(
            f"{name!r} is neither a file or folder here ({_nearest(Path(name))}) nor a data set that the hub "
            f"could give: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _datasets(act: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data", act) from error
    return datasets


def _pick_split(saved: Mapping[str, Any], split: str | None, where: str) -> Any:
    wanted = split or "train"
    if wanted not in saved:
        raise DataError(f"{where!r} has the splits {sorted(saved)}, not {wanted!r}{did_you_mean(wanted, saved)}")
    return saved[wanted]


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~", os.sep)) or name.count("/") > 1 or Path(name).suffix.lower() in SUFFIXES or not name
    )


def _nearest(path: Path) -> str:
    """What is there instead: the nearest names in the folder, or its data files."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {str(folder)!r} does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    near = did_you_mean(path.name, names)
    data = [name for name in names if Path(name).suffix.lower() in SUFFIXES]
    return f"no such name in {str(folder)!r}" + (near or (f", whose data files are {data[:10]}" if data else ""))
