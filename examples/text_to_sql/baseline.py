"""The baseline without training: the nearest training question's SQL, with this question's names swapped in.

Columns, values and numbers are found in a question by matching it against the table's schema and contents,
and are masked; the nearest masked training question (tf-idf of words and word pairs) lends its SQL, in which
the names give way to those of this question, by the order of mention and by type. Sees only what a model is
given and the tables' contents; knows nothing of how the questions were made.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from .build import TEST_SPLITS, build
from .questions import KINDS
from .score import score
from .tables import TABLES, Column, Table, values

__all__ = ["Baseline"]

Row = Mapping[str, Any]
Contents = Callable[[Table, Column], Sequence[Any]]  # the values of a column

_WORD = re.compile(r"-?\d+(?:\.\d+)?(?![\w-])|[\w'-]+(?:\.(?=\w)[\w'-]+)*")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?\Z")
_DATE = re.compile(r"\d{4}-\d\d-\d\d\Z")
_SQL_TOKEN = re.compile(r"'(?:[^']|'')*'|-?\d+(?:\.\d+)?|\w+|[^\w\s]|\s+")
_BY_NAME = {t.name: t for t in TABLES}
PAIR_WEIGHT = 0.25
LONGEST_NAME = 6  # words of a value or column name that are looked for


@dataclass(frozen=True)
class Mention:
    """A name in a question: a ``column`` with its type, a text ``value``, a ``number``, a ``table``."""

    what: str
    text: str
    type: str = ""


def _singular(word: str) -> str:
    for ending, instead in (("ies", "y"), ("sses", "ss"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 2 and not word.endswith("ss"):
            return word[: -len(ending)] + instead
    return word


def _key(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(_singular(w.lower()) for w in words)


@cache
def _names(table: Table, contents: Contents = values) -> dict[tuple[str, ...], Mention]:
    """What can be mentioned of a table, by its words; columns win over values, values over the table."""
    names = {_key(_WORD.findall(table.name.replace("_", " "))): Mention("table", table.name)}
    for column in table.of_role("category"):
        for value in dict.fromkeys(contents(table, column)):
            names[_key(_WORD.findall(str(value)))] = Mention("value", str(value))
    for column in table.columns:
        names[_key(column.name.split("_"))] = Mention("column", column.name, column.type)
    return names


def find_names(question: str, table: Table, contents: Contents = values) -> tuple[list[str], list[Mention]]:
    """``(masked words, mentions in order)``: the longest name at each place is masked by its sort."""
    words, names = _WORD.findall(question), _names(table, contents)
    masked: list[str] = []
    mentions: list[Mention] = []
    at = 0
    while at < len(words):
        mention, length = None, 1
        for size in range(min(LONGEST_NAME, len(words) - at), 0, -1):
            if (mention := names.get(_key(words[at : at + size]))) is not None:
                length = size
                break
        if mention is None and _NUMBER.match(words[at]):
            mention = Mention("number", words[at])
        elif mention is None and _DATE.match(words[at]):
            mention = Mention("value", words[at])
        if mention is None:
            masked.append(words[at].lower())
        else:
            masked.append(f"<{mention.what}>")
            mentions.append(mention)
        at += length
    return masked, mentions


def _terms(masked: Sequence[str]) -> dict[str, float]:
    """Words, and at a lower weight the pairs of neighbours, which carry the order."""
    pairs = (f"{a} {b}" for a, b in zip(["^", *masked], [*masked, "$"], strict=True))
    return {**dict.fromkeys(pairs, PAIR_WEIGHT), **dict.fromkeys(masked, 1.0)}


def _shape(mentions: Sequence[Mention]) -> tuple[tuple[str, int], ...]:
    """How many columns, values and numbers are mentioned: SQL from a question of another shape cannot fit."""
    return tuple(sorted(Counter(m.what for m in mentions if m.what != "table").items()))


class Baseline:
    """Answers questions from training rows; reads them once.

    Args:
        train: rows of the ``train`` split.
        tables: by the name that rows have for them.
        contents: the values of their columns.
    """

    def __init__(
        self, train: Sequence[Row], tables: Mapping[str, Table] = _BY_NAME, contents: Contents = values
    ) -> None:
        self.tables = tables
        self.contents = contents
        self.examples: list[tuple[Row, list[Mention]]] = []
        found: list[list[str]] = []
        for row in train:
            if row["table"] not in tables:
                continue  # renamed rows teach a model to copy names; here names are swapped in anyway
            masked, mentions = self._read(row)
            found.append(masked)
            self.examples.append((row, mentions))
        self.shapes = [_shape(mentions) for _, mentions in self.examples]
        spread = Counter(term for masked in found for term in _terms(masked))
        self.idf = {term: math.log(1 + len(train) / n) for term, n in spread.items()}
        self.postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        seen: dict[tuple[str, ...], int] = {}
        for n, masked in enumerate(found):
            if seen.setdefault(tuple(masked), n) == n:  # of questions that mask alike the first stands for all
                for term, weight in self._vector(masked).items():
                    self.postings[term].append((n, weight))

    def _vector(self, masked: Sequence[str]) -> dict[str, float]:
        weights = {t: n * self.idf[t] for t, n in _terms(masked).items() if t in self.idf}
        norm = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        return {term: weight / norm for term, weight in weights.items()}

    def answer(self, row: Row) -> str:
        """The SQL for a row's question; its gold SQL is not looked at."""
        found = self.nearest(row)
        if found is None:
            return ""
        (example, there), here = found
        return _swap(example, self.tables[example["table"]], there, self.tables[row["table"]], here)

    def nearest(self, row: Row) -> tuple[tuple[Row, list[Mention]], list[Mention]] | None:
        """The training row that is asked most alike with its mentions, and the mentions of ``row``."""
        masked, mentions = self._read(row)
        near: dict[int, float] = defaultdict(float)
        for term, weight in self._vector(masked).items():
            for n, other in self.postings[term]:
                near[n] += weight * other
        if not near:
            return None
        shape = _shape(mentions)
        best = max(near, key=lambda n: (self.shapes[n] == shape, near[n], -n))
        return self.examples[best], mentions

    def _read(self, row: Row) -> tuple[list[str], list[Mention]]:
        return find_names(row["prompt"][-1]["content"], self.tables[row["table"]], self.contents)


def _swap(example: Row, source: Table, there: list[Mention], table: Table, here: list[Mention]) -> str:
    """The example's SQL with its table, columns, texts and numbers replaced by those of another question."""
    tokens = _SQL_TOKEN.findall(example["sql"])
    types = {c.name: c.type for c in source.columns}
    place = {m.text: n for n, m in reversed(list(enumerate(there))) if m.what == "column"}
    after_from = [n for n, t in enumerate(tokens) if t == "from"]
    at_table = {n + 2 for n in after_from}  # "from", a space, the table: its name may be a column's too
    columns = {t for n, t in enumerate(tokens) if t in types and n not in at_table}
    swapped = _match_columns(sorted(columns, key=lambda c: (place.get(c, len(there)), c)), types, table, here)
    texts = [m.text for m in here if m.what == "value"]
    numbers = _in_sql_order(example["sql"], there, [m.text for m in here if m.what == "number"])
    out = []
    for n, token in enumerate(tokens):
        if n in at_table:
            out.append(table.name)
        elif token in swapped:
            out.append(swapped[token])
        elif token.startswith("'") and not token.startswith("'%"):  # that one is the form of a date
            out.append("'" + texts.pop(0).replace("'", "''") + "'" if texts else token)
        elif _NUMBER.match(token) and numbers:
            out.append(numbers.pop(0))
        else:
            out.append(token)
    return "".join(out)


def _match_columns(
    wanted: Sequence[str], types: Mapping[str, str], table: Table, here: list[Mention]
) -> dict[str, str]:
    """For each column of the example a mentioned one: by order where the types agree, else by type."""
    free = list(dict.fromkeys((m.text, m.type) for m in here if m.what == "column"))
    by_order = dict(zip(wanted, free, strict=False))
    by_type: dict[str, tuple[str, str]] = {}
    for column in wanted:
        fitting = [c for c in free if (c[1] == "text") == (types[column] == "text")] or free
        if fitting:
            by_type[column] = fitting[0]
            free.remove(fitting[0])

    def fits(found: Mapping[str, tuple[str, str]]) -> bool:
        return all((kind == "text") == (types[column] == "text") for column, (_, kind) in found.items())

    found = by_type if fits(by_type) and not fits(by_order) else by_order
    # Nothing mentioned is left: any column of that type is the best guess.
    spare = {c: next((o.name for o in table.columns if o.type == types[c]), table.columns[0].name) for c in wanted}
    return {column: found[column][0] if column in found else spare[column] for column in wanted}


def _in_sql_order(sql: str, there: Sequence[Mention], numbers: Sequence[str]) -> list[str]:
    """The numbers of a question in the order in which the example's SQL uses its own."""
    used = [t for t in _SQL_TOKEN.findall(sql) if _NUMBER.match(t)]
    asked = [m.text for m in there if m.what == "number"]
    order = [asked.index(n) for n in used if n in asked]
    return [numbers[n] for n in order if n < len(numbers)] or list(numbers)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m text_to_sql.baseline``: prints the baseline's accuracy on every test split."""
    parser = argparse.ArgumentParser(prog="python -m text_to_sql.baseline", description="Score the baseline.")
    parser.add_argument("--seed", type=int, default=0, help="of the training rows (default: 0)")
    parser.add_argument("--train", type=int, default=2000, help="training rows to choose from (default: 2000)")
    options = parser.parse_args(arguments)
    splits = build(options.seed, options.train)
    baseline = Baseline(splits["train"])
    print(f"{'split':<9}{'accuracy':>9}  " + "".join(f"{kind:>11}" for kind in KINDS))
    for split in TEST_SPLITS:
        result = score([baseline.answer(row) for row in splits[split]], splits[split])
        kinds = "".join(f"{result.by_kind[kind]:>11.0%}" for kind in KINDS)
        print(f"{split:<9}{result.accuracy:>9.1%}  {kinds}")


if __name__ == "__main__":
    main()
