"""An example as text, with what is learned of it and its control tokens told apart. Knows nothing of faults."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np

from deltaw.data.check_report import Finding
from deltaw.data.render import IGNORE, Rendered
from deltaw.data.tokens import TokenDataset

__all__ = ["Piece", "pick", "pieces", "preview"]


class Piece(NamedTuple):
    """A part of an example.

    Attributes:
        text: as decoded.
        learned: whether the loss covers it.
        control: whether it is special tokens, and not text that looks like them.
    """

    text: str
    learned: bool
    control: bool = False


def pieces(rendered: Rendered, tokenizer: Any, most: int | None = None) -> list[Piece]:
    """The example's text, cut where the loss or control tokens begin and end.

    Args:
        most: characters of a piece; the middle of a longer one is left out, and says so.
    """
    ids, learned = np.asarray(rendered.input_ids), np.asarray(rendered.labels) != IGNORE
    special = {*tokenizer.all_special_ids}
    special |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    kind = 2 * learned + np.isin(ids, list(special))
    bounds = [0, *(np.flatnonzero(kind[1:] != kind[:-1]) + 1).tolist(), len(ids)]
    return [
        Piece(_shortened(_decoded(tokenizer, rendered.input_ids[a:b]), most), bool(learned[a]), bool(kind[a] % 2))
        for a, b in pairwise(bounds)
        if a < b
    ]


def preview(rendered: Rendered, tokenizer: Any, *, color: bool = False) -> str:
    """The example as text, the supervised part in ``[[ ]]``, or in green with `color` (ANSI)."""
    opening, closing = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    parts = groupby(pieces(rendered, tokenizer), key=lambda piece: piece.learned)
    texts = ((learned, "".join(piece.text for piece in part)) for learned, part in parts)
    return "".join(f"{opening}{text}{closing}" if learned else text for learned, text in texts)


def pick(dataset: TokenDataset, findings: Iterable[Finding], most: int) -> list[int]:
    """Examples worth showing: of errors and warnings about rows one each, at most half; and some from all over."""
    n = len(dataset)
    chosen: dict[int, None] = {}
    for finding in findings:
        if finding.where == "train" and finding.level != "note":
            for row in finding.rows[:1]:
                at = int(np.searchsorted(dataset.rows, row))
                if at < n and dataset.rows[at] == row:
                    chosen[at] = None
    shown = dict.fromkeys(list(chosen)[: -(-most // 2)])
    for i in range(n if n < most else most):
        if len(shown) < most:
            shown[i * n // min(n, most)] = None
    return sorted(shown)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _shortened(text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    head, tail = text[: most // 2], text[-(most // 2) :]
    return f"{head} [... {len(text) - len(head) - len(tail):,} characters ...] {tail}"
