"""Puts a hard query into words. Knows nothing of how it was drawn."""

from __future__ import annotations

import random
import re
from typing import Any

from .hard_questions import HardQuery
from .hard_wordings import HardWordings
from .questions import Condition
from .tables import Column

__all__ = ["ask_hard"]


def ask_hard(query: HardQuery, words: HardWordings, rng: random.Random) -> tuple[str, str]:
    """``(question, frame)``: the query in words, and the frame it was asked in."""
    form = "null_fill_where" if query.form == "null_fill" and query.where else query.form
    frame = rng.choice(words.frames[form])
    slots: dict[str, Any] = {"rows": query.table.rows}
    for name, value in query.slots.items():
        if name == "label":
            slots[name] = value.plural
        elif name == "agg":
            slots[name] = rng.choice(words.easy.aggs[value])
        elif name in ("op", "size"):
            said = words.sizes if name == "size" else words.easy.ops
            slots[name] = rng.choice(said[value[0]]).format(x=value[1])
        elif isinstance(value, Column):
            slots[name] = _column_words(query, value, words, rng)
        else:
            slots[name] = value
    slots["where"] = " and ".join(_condition_words(query, one, words, rng) for one in query.where)
    return _article(frame.format(**slots)), frame


def _column_words(query: HardQuery, column: Column, words: HardWordings, rng: random.Random) -> str:
    said = rng.choice(column.says)
    if query.pair.table_of(column) is query.table:
        return said
    return rng.choice(words.parent).format(c=said, p=query.pair.noun)


def _condition_words(query: HardQuery, where: Condition, words: HardWordings, rng: random.Random) -> str:
    said, far = rng.choice(where.column.says), query.pair.table_of(where.column) is not query.table
    if where.op == "is":
        return rng.choice(words.missing if where.sql == "null" else words.present).format(c=said)
    if where.op in ("between", "month", "year"):
        a, _, b = where.says.partition("|")
        return rng.choice(getattr(words, where.op)).format(c=said, a=a, b=b, x=where.says)
    if where.op == "=":
        frames = words.parent_equal if far else words.easy.equal
        return rng.choice(frames).format(c=said, x=where.says, p=query.pair.noun)
    op = rng.choice(words.easy.ops[where.op]).format(x=where.says)
    return rng.choice(words.parent_compare if far else words.easy.compare).format(c=said, op=op, p=query.pair.noun)


def _article(text: str) -> str:
    """``an average``, ``an owner``."""
    return re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", text)
