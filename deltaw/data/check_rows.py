"""Findings about texts: what is in the rows themselves, before any token. Knows nothing of ids.

At most `_LOOKED_AT` rows are read, spread over the data, and the findings say of how many they speak.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from deltaw.data.check_report import Finding
from deltaw.data.formats import FORMATS, Example, columns_read, detect_format, to_example
from deltaw.data.render import RenderSettings
from deltaw.errors import DataError

__all__ = ["example_of", "row_findings", "spread"]

_LOOKED_AT = 50_000
_KEPT_ROWS = 20
_FEW = 20  # rows below which shares say nothing
_SPIKE = 0.05  # share of the answers that have exactly the greatest number of characters
_LONG = 200  # characters below which that is no wonder

# UTF-8 read as Windows-1252 or Latin-1: "é" becomes "Ã©", a curly quote "â€™"; each piece is confirmed by undoing it
_HIGH = "".join(bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xC0))
_MOJIBAKE = re.compile(f"[\u00c2-\u00f4][\u0080-\u00bf{re.escape(_HIGH)}]{{1,3}}")
_REPLACED = "\ufffd"
# a conversation within a text: the marks of the common templates, or names before colons on lines of their own
_CHAT = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant)\|>"
    r"|### (?:Instruction|Response):|(?:^|\n)(?:User|Human|Question|Q|Instruction|Prompt):[^\n]*\n+"
    r"(?:Assistant|AI|Bot|Answer|A|Response|Output):"
)
_Text = tuple[str, str]  # role, content


@dataclass
class _Tally:
    """How many rows show something, and which are the first."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, row: int, *what: str) -> None:
        self.count += 1
        self.seen.update(what)
        if len(self.rows) < _KEPT_ROWS:
            self.rows.append(row)


def spread(rows: Iterable[Mapping[str, Any]], most: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """At most `most` rows with their numbers: evenly spread where rows can be indexed, else the first."""
    if isinstance(rows, Sequence):
        n = len(rows)
        for i in range(min(n, most)):
            index = i * n // min(n, most)
            yield index, rows[index]
    else:
        yield from enumerate(islice(rows, most))


def example_of(
    row: Mapping[str, Any], settings: RenderSettings, *, chat: bool = True, answered: bool = True
) -> Example:
    """The row in normal form, as rendering reads it.

    Raises:
        DataError: the row cannot be understood.
    """
    return to_example(
        row,
        settings.text_field,
        chat=chat,
        answered=answered,
        dataset_format=settings.dataset_format,
        label_names=settings.label_names,
    )


def row_findings(
    rows: Iterable[Mapping[str, Any]],
    settings: RenderSettings,
    tokenizer: Any,
    *,
    used_columns: Sequence[str] = (),
    where: str = "train",
) -> Iterator[Finding]:
    """Findings about the texts of the rows; a row that cannot be understood is left to the renderer, which says so.

    Args:
        used_columns: columns that something else reads.
    """
    control = _control_pattern(tokenizer)
    tallies: dict[str, _Tally] = {}
    unread: Counter[str] = Counter()
    answers: Counter[int] = Counter()  # characters -> answers
    looked = 0

    def tally(name: str, row: int, *what: str) -> None:
        tallies.setdefault(name, _Tally()).add(row, *what)

    for number, row in spread(rows, _LOOKED_AT):
        try:
            example = example_of(row, settings, chat=bool(settings.chat_template or tokenizer.chat_template))
            kind = (
                settings.dataset_format
                if settings.dataset_format != "auto"
                else detect_format(row, settings.text_field)
            )
        except DataError:
            continue
        looked += 1
        read = columns_read(kind, settings.text_field)
        unread.update(str(key) for key, value in row.items() if value is not None and key not in read)
        texts = _texts(example)
        written_out = example.text is not None and bool(_CHAT.search(example.text))
        hits = {hit for _, text in texts for hit in control.findall(text)} if control else set()
        if hits and not written_out:
            tally("control-tokens", number, *hits)
        if wrong := {bad for _, text in texts for bad in _undecoded(text)}:
            tally("mojibake", number, *wrong)
        if written_out:
            tally("chat-as-text", number)
        asked = [text for role, text in texts if role in ("user", "prompt")]
        if asked and not any(text.strip() for text in asked):
            tally("empty-prompt", number)
        answer = _answer(example)
        if answer is not None:
            answers[len(answer)] += 1
            if asked and len(asked[-1].strip()) > 10 and answer.strip().startswith(asked[-1].strip()):
                tally("answer-repeats-prompt", number)
        if skipped := _skipped(example, settings):
            tally("unsupervised-turns", number, *[""] * skipped)
    yield from _tell(tallies, looked, settings, where)
    columns = {name: count for name, count in unread.items() if name not in used_columns}
    if columns and where == "train":  # the other side has the same
        said = ", ".join(f"{name!r}" for name in sorted(columns))
        meant = {column for name in FORMATS for column in columns_read(name)}  # by another format
        level = "warning" if meant & columns.keys() else None
        yield Finding.of("unread-columns", f"columns {said} of {looked:,} rows", where=where, level=level)
    longest, total = max(answers, default=0), answers.total()
    if total >= _FEW and longest >= _LONG and answers[longest] >= _SPIKE * total and answers[longest] > 1:
        said = f"{answers[longest]:,} of {total:,} answers have exactly {longest} characters, and none has more"
        yield Finding.of("cut-upstream", said, count=answers[longest], where=where)


def _tell(tallies: dict[str, _Tally], looked: int, settings: RenderSettings, where: str) -> Iterator[Finding]:
    says = {
        "control-tokens": "hold the text of control tokens ({seen})",
        "mojibake": "hold characters that were decoded wrongly ({seen})",
        "chat-as-text": "are conversations in a column of plain text",
        "empty-prompt": "have an empty prompt",
        "answer-repeats-prompt": "repeat their prompt at the start of the answer",
        "unsupervised-turns": "have earlier turns of the assistant that the loss does not cover",
    }
    for name, tally in tallies.items():
        seen = ", ".join(repr(what) for what, _ in tally.seen.most_common(3)) + (", ..." if len(tally.seen) > 3 else "")
        said = f"{tally.count:,} of {looked:,} rows {says[name].format(seen=seen)}"
        asked_for = name == "unsupervised-turns" and settings.last_turn_only_loss
        yield Finding.of(
            name, said, rows=tally.rows, count=tally.count, where=where, level="note" if asked_for else None
        )


def _texts(example: Example) -> list[_Text]:
    """Every text of the example that a person or a program wrote, with who said it."""
    if example.text is not None:
        return [("text", example.text)]
    if isinstance(example.prompt, str):
        return [("prompt", example.prompt), ("assistant", str(example.completion or ""))]
    turns = example.messages
    if turns is None:
        completion = example.completion if isinstance(example.completion, list) else []
        turns = [*(example.prompt if isinstance(example.prompt, list) else []), *completion]
    return [(str(turn["role"]), str(turn.get("content") or "")) for turn in turns]


def _answer(example: Example) -> str | None:
    texts = _texts(example)
    return texts[-1][1] if texts and texts[-1][0] == "assistant" else None


def _skipped(example: Example, settings: RenderSettings) -> int:
    """Turns of the assistant that the loss leaves out although the row has them."""
    if not example.is_chat or settings.completion_only_loss is False:
        return 0
    if example.messages is not None:
        turns = sum(turn["role"] == "assistant" for turn in example.messages)
        return max(0, turns - 1) if settings.last_turn_only_loss else 0
    prompt = example.prompt if isinstance(example.prompt, list) else []
    return sum(turn["role"] == "assistant" for turn in prompt)


def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Texts that the tokenizer reads as one special token; those that are ordinary words to people are left out."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    marked = sorted((token for token in special if not token.isalnum()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marked))) if marked else None


def _undecoded(text: str) -> set[str]:
    """Pieces that are UTF-8 read as something else, or were lost on the way."""
    if text.isascii():
        return set()
    found = {_REPLACED} if _REPLACED in text else set()
    return found | {
        piece for piece in _MOJIBAKE.findall(text) if _is_utf8(piece, "cp1252") or _is_utf8(piece, "latin-1")
    }


def _is_utf8(piece: str, read_as: str) -> bool:
    try:
        return len(piece.encode(read_as).decode("utf-8")) < len(piece)
    except UnicodeError:
        return False
