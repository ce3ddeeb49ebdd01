"""Text -> token ids, also in parts; and the control tokens of a tokenizer. Knows nothing of rows or templates."""

from __future__ import annotations

import functools
import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from deltaw.data.templates import begins_with_bos
from deltaw.errors import DataError

__all__ = ["ControlTokens", "control_tokens", "encode", "encode_parts"]


def encode(tokenizer: Any, text: str, *, plain: bool = False) -> list[int]:
    """Ids of the text alone: nothing added before or after it.

    Args:
        plain: special tokens that are written in the text are plain characters.

    Raises:
        DataError: the text holds half a character.
    """
    options = {"split_special_tokens": True} if plain else {}
    try:
        return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)[
            "input_ids"
        ]
    except (TypeError, UnicodeError) as error:
        bad = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
        if bad is None:
            raise
        raise DataError(f"character {bad} of its text is half a character (a lone surrogate): clean it") from error


@dataclass(frozen=True)
class ControlTokens:
    """The added tokens of a tokenizer that are special: what templates are made of, and what no row may become.

    Attributes:
        ids: how each is written -> its id.
        pattern: finds them, the longest first.
        closers: what a template may close a turn with: these, and whatever stands for eos and the like.
        swallow_left, swallow_right: those that take the white space on that side with them.
        unk: the id for characters without a token; the only one of these that a row's text may become.
        bos: the id of BOS, if the tokenizer puts it before plain text.
        spaced: whether a text alone is encoded otherwise than behind a control token (with a space before it).
        normalize: what the tokenizer makes of a text before it looks at it.
        folds: whether that changes ASCII letters too.
    """

    ids: dict[str, int]
    pattern: re.Pattern[str]
    closers: tuple[str, ...]
    swallow_left: frozenset[str]
    swallow_right: frozenset[str]
    unk: int | None
    bos: int | None
    spaced: bool
    normalize: Callable[[str], str] | None
    folds: bool

    @functools.cached_property
    def banned(self) -> frozenset[int]:
        """Ids that no text of a row may become."""
        return frozenset(self.ids.values()) - {self.unk}

    @functools.cached_property
    def longest(self) -> int:
        """Characters of the longest."""
        return max(map(len, self.ids), default=0)

    @functools.cached_property
    def heads(self) -> frozenset[str]:
        """What they begin with, shorter than themselves."""
        return frozenset(text[:n] for text in self.ids for n in range(1, len(text)))

    @functools.cached_property
    def tails(self) -> frozenset[str]:
        """What they end with, shorter than themselves."""
        return frozenset(text[n:] for text in self.ids for n in range(1, len(text)))

    @functools.cached_property
    def edges(self) -> tuple[str, str, str]:
        """Their first characters, their last ones, and all of them in one string, to be looked through quickly."""
        firsts, lasts = {text[0] for text in self.ids}, {text[-1] for text in self.ids}
        return "".join(firsts), "".join(lasts), "\0".join(self.ids)


_known: weakref.WeakKeyDictionary[Any, tuple[Any, ControlTokens]] = weakref.WeakKeyDictionary()


def control_tokens(tokenizer: Any) -> ControlTokens:
    """Read from the tokenizer, anew only after it got others."""
    state = (len(tokenizer), tokenizer.all_special_tokens)
    known = _known.get(tokenizer)
    if known is None or known[0] != state:
        known = _known[tokenizer] = (state, _read(tokenizer))
    return known[1]


def _read(tokenizer: Any) -> ControlTokens:
    tokens = [(token, id_) for id_, token in tokenizer.added_tokens_decoder.items() if token.special and token.content]
    ids = {token.content: id_ for token, id_ in tokens}
    longest_first = sorted(ids, key=len, reverse=True)
    probe = next((text for text in ids if encode(tokenizer, text + "a")[:1] == [ids[text]]), None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    return ControlTokens(
        ids=ids,
        pattern=re.compile("|".join(map(re.escape, longest_first)) or "(?!)"),  # (?!) finds nothing
        closers=tuple(dict.fromkeys([*ids, *tokenizer.all_special_tokens])),
        swallow_left=frozenset(token.content for token, _ in tokens if token.lstrip),
        swallow_right=frozenset(token.content for token, _ in tokens if token.rstrip),
        unk=tokenizer.unk_token_id,
        bos=tokenizer.bos_token_id if begins_with_bos(tokenizer) else None,
        spaced=probe is not None and encode(tokenizer, "a") != encode(tokenizer, probe + "a")[1:],
        normalize=None if normalizer is None else normalizer.normalize_str,
        folds=normalizer is not None and normalizer.normalize_str("aA").lstrip(" \u2581") != "aA",
    )


# --- a text in parts ----------------------------------------------------------------------------------------


def encode_parts(
    tokenizer: Any, parts: Sequence[str], encoded: Callable[[str], list[int]] | None = None
) -> list[list[int]]:
    """Ids of the joined text, cut where the parts meet, so that each beginning has the ids that it has by itself.

    So the ids before an answer are those from which generation goes on. Where a token would straddle a cut, and the
    tokens before it change, the part behind it is encoded alone.

    Args:
        parts: pieces of one text, in order.
        encoded: encodes a text; None: as the tokenizer does it.
    """
    if encoded is None:
        found = _by_control_tokens(tokenizer, parts)
        if found is not None:
            return found
        encoded = functools.partial(encode, tokenizer)
    ids: list[int] = []
    pieces: list[list[int]] = []
    text = ""
    for part in parts:
        text += part
        whole = encoded(text)
        new = whole[len(ids) :] if whole[: len(ids)] == ids else encoded(part)
        ids += new
        pieces.append(new)
    return pieces


def _by_control_tokens(tokenizer: Any, parts: Sequence[str]) -> list[list[int]] | None:
    """The same from one encoding of the whole; None where a token straddles a cut.

    A tokenizer looks at the texts between control tokens one by one. So what a beginning is encoded to by itself is
    known up to the last control token in it, and only the few characters behind that are encoded again.
    """
    control = control_tokens(tokenizer)
    text = "".join(parts)
    whole = encode(tokenizer, text)
    if len(parts) == 1:
        return [whole]
    of = control.ids
    matches = list(control.pattern.finditer(text))
    values = set(of.values())
    places = [i for i, id_ in enumerate(whole) if id_ in values]
    if [whole[i] for i in places] != [of[match[0]] for match in matches]:
        return None
    ends = [match.end() for match in matches]
    bounds = [0]
    for cut in list(accumulate(map(len, parts)))[:-1]:
        k = bisect_right(ends, cut)  # control tokens before the cut
        if k < len(matches) and matches[k].start() < cut:
            return None
        start, place = (matches[k - 1].start(), places[k - 1]) if k else (0, 0)
        head = encode(tokenizer, text[start:cut])
        if whole[place : place + len(head)] != head:
            return None
        bounds.append(place + len(head))
    bounds.append(len(whole))
    return [whole[a:b] for a, b in pairwise(bounds)]
