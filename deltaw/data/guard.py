"""The text of a row never becomes a control token. Knows nothing of what a row means.

A tokenizer turns the string ``<|im_end|>`` into the token that ends a turn, whoever wrote it. So what a row says is
looked through first. Where it holds such a string, or one end of one, a mark stands in for those characters while the
template is rendered, and the stretch of text around the mark is encoded with the special tokens switched off. All other
text, and so nearly every row, is encoded as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deltaw.data.encode import ControlTokens, control_tokens, encode
from deltaw.errors import DataError

__all__ = ["Guard"]

MARKS = range(0xF0000, 0xFFFFE)  # private-use characters: a row is given ones that it does not use itself


class Guard:
    """Hides the control tokens that are written in one row, and encodes the text that it was rendered to.

    Attributes:
        count: control tokens hidden.
    """

    def __init__(self, tokenizer: Any, texts: Any) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        self.count = 0
        used = {char for text in _strings(texts) for char in text if ord(char) >= MARKS.start}
        self._free = (char for char in map(chr, MARKS) if char not in used)
        self._marks: dict[str, str] = {}  # hidden text -> mark
        self._shown: dict[int, str] = {}  # mark -> hidden text

    @classmethod
    def over(cls, tokenizer: Any, texts: Sequence[str], others: Any = ()) -> Guard | None:
        """A guard for a row; None where nothing must be hidden, which is the usual case.

        Args:
            texts: that are put into the template as they are.
            others: lists and mappings of further strings, which are put there as JSON.
        """
        control = control_tokens(tokenizer)
        if any(_suspect(control, text) for text in texts) or any(_finds(control, text) for text in _strings(others)):
            return cls(tokenizer, [texts, others])
        return None

    # --- hiding

    def hide(self, text: str, *, ends: bool = True) -> str:
        """The text with marks in it.

        Args:
            ends: also hide what may become a control token together with the text beside it.
        """
        hidden = self.control.pattern.sub(lambda match: self._counted(match[0]), text)
        if _finds(self.control, hidden):  # only the tokenizer's normalization brings it out
            return self._counted(text)
        if not ends:
            return hidden
        if len(hidden) < self.control.longest and hidden and hidden in self.control.edges[2]:
            return self._mark(hidden)
        if n := _overlap(hidden, self.control, at_end=False):
            hidden = self._mark(hidden[:n]) + hidden[n:]
        if n := _overlap(hidden, self.control, at_end=True):
            hidden = hidden[:-n] + self._mark(hidden[-n:])
        return hidden

    def hide_all(self, value: Any) -> Any:
        """The same for all strings in lists and mappings, names included, which are not joined with other text."""
        if isinstance(value, str):
            return self.hide(value, ends=False)
        if isinstance(value, dict):
            return {self.hide_all(name): self.hide_all(item) for name, item in value.items()}
        return [self.hide_all(item) for item in value] if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        """The text with the marks undone."""
        return text.translate(self._shown)

    def show_error(self, error: DataError) -> DataError:
        """The error with the marks in its message undone, also where it quotes them."""
        message = str(error)
        for text, mark in self._marks.items():
            message = message.replace(mark, text).replace(repr(mark)[1:-1], text)
        return DataError(message)

    def _counted(self, text: str) -> str:
        self.count += 1
        return self._mark(text)

    def _mark(self, text: str) -> str:
        if text not in self._marks:
            mark = next(self._free, None)
            if mark is None:
                raise DataError("its text uses all private-use characters of Unicode: clean it")
            self._marks[text] = mark
            self._shown[ord(mark)] = text
        return self._marks[text]

    # --- encoding

    def encode(self, text: str) -> list[int]:
        """Ids of a text with marks, in which only the template's control tokens are control tokens."""
        matches = list(self.control.pattern.finditer(text))
        ids: list[int] = []
        before, start = "", 0
        for match in [*matches, None]:
            after = "" if match is None else match[0]
            region = text[start:] if match is None else text[start : match.start()]
            ids += self._region(before, region, after)
            if match is not None:
                before, start = match[0], match.end()
        return ids

    def _region(self, before: str, region: str, after: str) -> list[int]:
        """Ids of a control token (or nothing) and the text between it and the next one."""
        text = self.show(region)
        harmless = text == region or not self._forged(before, text, after)
        if after in self.control.swallow_left:
            text = text.rstrip()
        if harmless:
            return encode(self.tokenizer, before + text) if before or text else []
        if before in self.control.swallow_right:
            text = text.lstrip()
        return [*([self.control.ids[before]] if before else []), *self._plain(text, bool(before))]

    def _forged(self, before: str, text: str, after: str) -> bool:
        """Whether the tokenizer would see other control tokens than the two around the text."""
        around = before + text + after
        spans = [match.span() for match in self.control.pattern.finditer(around)]
        real = [(0, len(before))] * bool(before) + [(len(around) - len(after), len(around))] * bool(after)
        return spans != real or _finds(self.control, text)

    def _plain(self, text: str, behind: bool) -> list[int]:
        """Ids of a text of plain characters; ``behind`` a control token no space is put before it."""
        ids = encode(self.tokenizer, text, plain=True)
        if behind and self.control.spaced:  # so it is put before a line break, which is then taken away
            breaks = encode(self.tokenizer, "\n", plain=True)
            longer = encode(self.tokenizer, "\n" + text, plain=True)
            if longer[: len(breaks)] == breaks:
                ids = longer[len(breaks) :]
        if self.control.banned.isdisjoint(ids):
            return ids
        if len(text) < 2:  # the tokenizer has no other token for this character
            raise DataError(
                f"its text holds {text!r}, which is a control token of this tokenizer in any case: clean it"
            )
        half = len(text) // 2
        return self._plain(text[:half], behind) + self._plain(text[half:], True)


def _strings(value: Any) -> Iterator[str]:
    """All strings in a value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if isinstance(name, str):
                yield name
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _suspect(control: ControlTokens, text: str) -> bool:
    """Whether the text may become a control token, by itself or together with what stands beside it."""
    if _finds(control, text):
        return True
    n = control.longest
    firsts, lasts, joined = control.edges
    end, start = text[-n:], text[:n]
    return (
        (any(char in end for char in firsts) and _overlap(text, control, at_end=True) > 0)
        or (any(char in start for char in lasts) and _overlap(text, control, at_end=False) > 0)
        or (0 < len(text) < n and text in joined)
    )


def _finds(control: ControlTokens, text: str) -> bool:
    """Whether a control token is written in the text, as it is or as the tokenizer normalizes it."""
    if control.pattern.search(text):
        return True
    if control.normalize is None or (text.isascii() and not control.folds):
        return False
    return control.pattern.search(control.normalize(text)) is not None


def _overlap(text: str, control: ControlTokens, *, at_end: bool) -> int:
    """Characters at that end of the text that are the beginning (or the end) of a control token; the most."""
    for n in range(min(len(text), control.longest - 1), 0, -1):
        if (text[-n:] in control.heads) if at_end else (text[:n] in control.tails):
            return n
    return 0
