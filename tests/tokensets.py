"""Examples, rows and comparisons that the tests of token data sets share."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from deltaw.data import Rendered, TokenDataset
from deltaw.data.render import IGNORE
from deltaw.data.tokens import COLUMNS


def same(one: TokenDataset, other: TokenDataset) -> bool:
    """Whether all arrays agree, to the last element and its type."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in COLUMNS]
    return one.dropped == other.dropped and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@st.composite
def rendered(draw: st.DrawFn) -> Rendered:
    """An example as a renderer may make it, empty ones among them."""
    ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=12))
    mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    cut, lost, escaped = (draw(st.integers(0, 9)) for _ in range(3))
    labels = [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]
    return Rendered(ids, labels, len(ids) + cut, lost, escaped)


def question(i: int) -> dict[str, Any]:
    """One row; its length varies with ``i``."""
    return {"prompt": f"What is {i} and {'x' * (i % 7)}?", "completion": f"It is {i * i}."}


def conversation(i: int) -> dict[str, Any]:
    """One row of two or four messages."""
    turns = [("user", f"say {i}"), ("assistant", f"{i}!"), ("user", "and again"), ("assistant", f"{i}, é {i}!")]
    return {"messages": [{"role": role, "content": text} for role, text in turns[: 2 + 2 * (i % 2)]]}
