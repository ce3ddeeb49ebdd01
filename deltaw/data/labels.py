"""Classification as a short answer: which labels there are, how they are asked for, and which one a row has.

Knows nothing of templates or ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deltaw.errors import DataError, did_you_mean

__all__ = ["LABEL", "label_of", "labels_in", "question"]

LABEL = "label"
MOST_LABELS = 200  # all of them stand in each question
NAMES = "dataset_label_names: [name of 0, name of 1, ...]"


def question(text: str, names: Sequence[str] | None) -> str:
    """The text and what is asked about it. The question comes last: a long text is cut from the left."""
    if not names:
        raise DataError(f"a text with a label needs the names of all labels: give {NAMES}, or dataset_format: text")
    return f"{text}\n\nAnswer with one of these labels and nothing else: {', '.join(names)}."


def label_of(row: Mapping[str, Any], names: Sequence[str] | None) -> str:
    """The name of a row's label: as it is written, or the one of its number.

    Raises:
        DataError: none of the names, a number beyond them, or no name and no number at all.
    """
    value = row.get(LABEL)
    if names is None:
        names = ()
    if isinstance(value, str) and value in names:
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*", value):
        value = int(value)  # a csv file has no numbers
    if isinstance(value, int):
        if 0 <= value < len(names):
            return names[int(value)]
        have = f"and the label names are {list(names)}" if names else "and its number says no name"
        raise DataError(f"its label is {value}, {have}: give {NAMES}")
    if isinstance(value, str):
        raise DataError(f"its label {value!r} is none of {list(names)}{did_you_mean(value, names)}")
    raise DataError(f"its label must be a name or a whole number, not {type(value).__name__} {value!r}")


def labels_in(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all labels in rows of a classification, sorted.

    Raises:
        DataError: numbers, whose names are not in the rows; or so many that they are no classes.
    """
    found: set[str] = set()
    for count, row in enumerate(rows, 1):
        value = row.get(LABEL)
        if isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"\s*\d+\s*", value)):
            raise DataError(f"the labels are numbers ({value!r}), which say nothing to a model: give {NAMES}")
        if isinstance(value, str):
            if not value.strip():
                raise DataError("a label is an empty string: leave that row out, or give it a name")
            found.add(value)
        if len(found) > MOST_LABELS:
            raise DataError(
                f"{LABEL} holds more than {MOST_LABELS} different names in {count:,} rows, so it is no class: write "
                "the rows as prompt and completion, or set dataset_format: text to leave the column out"
            )
    return sorted(found)
