"""A name or a path -> rows, as a list of plain dicts. Knows nothing of what the rows mean.

Local files are read by the standard library (parquet by pyarrow) and never downloaded or copied; only a name
that is no path on this machine goes to the hub, through `datasets`, which honours HF_HUB_OFFLINE.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltaw.errors import DataError, MissingExtra, did_you_mean

__all__ = ["as_rows", "load_rows"]

SHOWN_ERRORS = 5
Row = dict[str, Any]


def load_rows(name: str, split: str | None = None, *, limit: int | None = None, seed: int = 0) -> list[Row]:
    """Rows of a file (.jsonl, .ndjson, .json, .csv, .parquet), a folder of such files, or a hub data set.

    Args:
        name: the file, the folder or the hub id.
        split: which part; "train" when None. In a folder the file is named after it (``train.jsonl``,
            ``train-00000-of-00002.parquet``, also within ``data/``); in a .json object it may be a key.
        limit: keep at most this many rows, drawn without replacement by `seed`, in their original order.
        seed: of that draw.

    Raises:
        DataError: nothing there (with the nearest names), no such split, or broken lines, each as file:line.
        MissingExtra: a parquet file or a hub id without the packages that read them.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        rows = _read_folder(path, split)
    elif path.is_file():
        rows = _read_file(path, split)
    elif _looks_like_path(name):
        raise DataError(f"no data at {name!r}: {_nearest(path)}")
    else:
        rows = _read_hub(name, split)
    if not rows:
        raise DataError(f"{name!r} holds no rows")
    if limit is not None and limit < len(rows):
        if limit < 1:
            raise DataError(f"limit must be at least 1, not {limit}")
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    return rows


def as_rows(dataset: Any) -> list[Row]:
    """A list of dicts, a `datasets.Dataset`, a data frame, or any sequence of mappings, as a list of dicts.

    Raises:
        DataError: a dict of splits or of columns, a string, or elements that are not mappings.
    """
    if isinstance(dataset, str | os.PathLike):
        raise DataError(f"{os.fspath(dataset)!r} is a name, not rows: read it with load_rows first")
    if isinstance(dataset, Mapping):
        keys = [str(key) for key in dataset]
        raise DataError(f"rows must be a list of dicts, not a mapping of {keys}: pick one split, or zip the columns")
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):  # a pandas data frame
        return dataset.to_dict("records")
    if isinstance(dataset, Iterable):
        rows = list(dataset)
    elif hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):  # a torch map-style data set
        rows = [dataset[i] for i in range(len(dataset))]
    else:
        raise DataError(f"rows must be a sequence of mappings, not {type(dataset).__name__}")
    bad = [i for i, row in enumerate(rows) if not isinstance(row, Mapping)]
    if bad:
        kind = type(rows[bad[0]]).__name__
        raise DataError(f"{len(bad)} of {len(rows)} rows are not mappings; row {bad[0]} is a {kind}")
    return [dict(row) for row in rows]


def _read_folder(folder: Path, split: str | None) -> list[Row]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():  # save_to_disk
        saved = _datasets("reading a saved data set").load_from_disk(str(folder))
        return as_rows(_pick_split(saved, split, str(folder)) if isinstance(saved, Mapping) else saved)
    found = [
        file
        for place in (folder, folder / "data")
        if place.is_dir()
        for file in sorted(place.iterdir())
        if file.suffix.lower() in READERS and file.is_file()
    ]
    wanted = split or "train"
    pattern = re.compile(rf"{re.escape(wanted)}(-.*)?")
    chosen = [file for file in found if pattern.fullmatch(file.stem)]
    if not chosen and split is None and len(found) == 1:
        chosen = found
    if not chosen:
        names = [file.name for file in found]
        raise DataError(
            f"folder {str(folder)!r} has no file for the split {wanted!r}"
            + (f"; data files there: {names}" if names else f"; it has no file of {sorted(READERS)}")
            + did_you_mean(wanted, [file.stem for file in found])
        )
    return [row for file in chosen for row in _read_file(file, None)]


def _read_file(path: Path, split: str | None) -> list[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{str(path)!r} is of no kind that can be read: {sorted(READERS)}")
    try:
        content = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    if isinstance(content, Mapping):
        return _rows_of_object(path, content, split)
    # a plain file has no parts: giving all of it for "test" would quietly evaluate on the training rows
    if split not in (None, "train", path.stem):
        raise DataError(f"{str(path)!r} is one file and has no split {split!r}: name the file of that split instead")
    return content


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    faults: list[str] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                faults.append(f"{path}:{number}: {error}")
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                faults.append(f"{path}:{number}: a {type(row).__name__}, not an object")
    _raise_faults(path, faults)
    return rows


def _read_json(path: Path) -> list[Row] | dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = " (one object a line? then name it .jsonl)" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: {error}{hint}") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply") from error
    if isinstance(content, list):
        faults = [
            f"{path}: element {i} is a {type(row).__name__}, not an object"
            for i, row in enumerate(content)
            if not isinstance(row, dict)
        ]
        _raise_faults(path, faults)
        return content
    if isinstance(content, dict):
        return content
    raise DataError(f"{path} holds a {type(content).__name__}; it must be a list of objects")


def _rows_of_object(path: Path, content: Mapping[str, Any], split: str | None) -> list[Row]:
    """The list in a JSON object: the one named after the split, or the only one."""
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    wanted = split or "train"
    if wanted in lists:
        rows = lists[wanted]
    elif len(lists) == 1 and split in (None, "train", path.stem):
        rows = next(iter(lists.values()))
    else:
        raise DataError(f"{path} is an object with the lists {sorted(lists)}; none is the split {wanted!r}")
    return as_rows(rows)


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of 128 KiB, which a document easily is
    rows: list[Row] = []
    faults: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, restkey=None)
        try:
            for row in reader:
                if None in row or None in row.values():
                    width = len(reader.fieldnames or [])
                    faults.append(f"{path}:{reader.line_num}: not {width} cells, as the header has")
                rows.append(row)
        except csv.Error as error:
            faults.append(f"{path}:{reader.line_num}: {error}")
    _raise_faults(path, faults)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", "reading a parquet file") from error
    try:
        return parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


READERS = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_hub(name: str, split: str | None) -> list[Row]:
    datasets = _datasets(f"reading the data set {name!r} from the hub")
    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client raises errors of many libraries
        raise DataError(
            f"{name!r} is neither a file or folder here ({_nearest(Path(name))}) nor a data set that the hub "
            f"could give: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return as_rows(loaded)


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
        name.startswith((".", "~", os.sep)) or name.count("/") > 1 or Path(name).suffix.lower() in READERS or not name
    )


def _nearest(path: Path) -> str:
    """What is there instead: the nearest names in the folder, or its data files."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {str(folder)!r} does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    near = did_you_mean(path.name, names)
    data = [name for name in names if Path(name).suffix.lower() in READERS]
    return f"no such name in {str(folder)!r}" + (near or (f", whose data files are {data[:10]}" if data else ""))


def _raise_faults(path: Path, faults: list[str]) -> None:
    if faults:
        more = [f"... and {len(faults) - SHOWN_ERRORS} more"] if len(faults) > SHOWN_ERRORS else []
        lines = "\n  ".join([*faults[:SHOWN_ERRORS], *more])
        raise DataError(f"{path} has {len(faults)} broken row(s):\n  {lines}")
