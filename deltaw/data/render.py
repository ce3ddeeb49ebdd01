"""One row -> token ids and labels: what the model reads, and which of it the loss covers.

Knows nothing of files, batches or models. Three promises, each tested:

- the tokens before an answer are those that generation sees for the same prompt (`render_prompt`);
- the token that ends an answer is always supervised, so that a trained model stops;
- nothing is cut silently: a truncated example says how long it was and how many supervised tokens it lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.data.chat import Segment, apply_template, chat_segments, encode, ends_turn, stop_token_ids
from deltaw.data.formats import Example, Message, to_example
from deltaw.errors import ConfigError, DataError

__all__ = [
    "DEFAULT_SETTINGS",
    "IGNORE",
    "RenderSettings",
    "Rendered",
    "render",
    "render_all",
    "render_prompt",
    "stop_token_ids",
]

IGNORE = -100
SHOWN_ERRORS = 5


@dataclass(frozen=True)
class RenderSettings:
    """How rows become tokens; the fields are SFTConfig's.

    Args:
        max_length: longest example in tokens; longer ones are cut on the right. None cuts nothing.
        completion_only_loss: None puts the loss on the answers where a row has any (a completion, the
            assistant's turns) and on everything for plain text; True is the same, but refuses plain text;
            False puts it on every token.
        assistant_only_loss: the loss covers the assistant's turns and nothing else; refuses rows that are
            not conversations. With ``completion_only_loss=False`` the assistant's turns within the prompt
            count as well.
        text_field: the column of plain text.
        last_turn_only_loss: the loss covers the last answer of a conversation and nothing else.
        dataset_format: of the rows, as `deltaw.data.formats` names them; "auto" looks at their keys.
        overlong: what becomes of an example longer than `max_length`: "error" (found by the check), "drop",
            "truncate_prompt" (cut from the left, the answer stays whole), or "truncate" (cut on the right).
        chat_template: used in place of the tokenizer's own.
    """

    max_length: int | None = 1024
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    text_field: str = "text"
    last_turn_only_loss: bool = False
    dataset_format: str = "auto"
    overlong: str = "error"
    chat_template: str | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length must be at least 1, or None for no limit; not {self.max_length}")


DEFAULT_SETTINGS = RenderSettings()


@dataclass(frozen=True)
class Rendered:
    """One example, ready to be batched. `labels` are the ids where the loss is taken, `IGNORE` elsewhere."""

    input_ids: list[int]
    labels: list[int]
    length_before_truncation: int
    cut_supervised: int = 0  # supervised tokens that truncation removed

    @property
    def supervised(self) -> int:
        """How many tokens the loss covers."""
        return len(self.labels) - self.labels.count(IGNORE)

    def as_features(self) -> dict[str, list[int]]:
        """What a data loader hands to the collator."""
        return {"input_ids": self.input_ids, "labels": self.labels}


def render(row: Mapping[str, Any], tokenizer: Any, settings: RenderSettings = DEFAULT_SETTINGS) -> Rendered:
    """Token ids and labels of one row.

    Args:
        row: in any format of `deltaw.data.formats`.
        tokenizer: a transformers tokenizer; its chat template renders conversations.
        settings: see `RenderSettings`.

    Raises:
        DataError: the row cannot be understood, or cannot be rendered as the settings ask.
    """
    example = _example(row, tokenizer, settings, answered=True)
    _require_fit(example, settings)
    segments = _segments(example, tokenizer, settings)
    ids, labels = _tokens(tokenizer, segments, [] if example.is_chat else _lead(tokenizer, segments))
    # a template closes the turn itself; where nothing does, eos must, or the model never learns to stop
    if segments and segments[-1].supervised and not (example.is_chat and ends_turn(tokenizer, segments[-1].text)):
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos token, so no example can end: set tokenizer.eos_token")
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
    labels[:1] = [IGNORE] * len(labels[:1])  # nothing precedes the first token, so nothing predicts it
    length = len(ids)
    cut = slice(length if settings.max_length is None else settings.max_length, None)
    lost = sum(label != IGNORE for label in labels[cut])
    del ids[cut], labels[cut]
    return Rendered(ids, labels, length, lost)


def render_prompt(row: Mapping[str, Any], tokenizer: Any, settings: RenderSettings = DEFAULT_SETTINGS) -> list[int]:
    """The ids from which the answer to a row is generated: exactly those that precede it in `render`.

    The answer itself may be present or absent. Nothing is truncated. Plain text is continued from its end.

    Raises:
        DataError: as `render`.
    """
    example = _example(row, tokenizer, settings, answered=False)
    if not example.is_chat:
        text = example.prompt if isinstance(example.prompt, str) else example.text or ""
        segments = [Segment(text, False)]
        return _tokens(tokenizer, segments, _lead(tokenizer, segments))[0]
    messages = _prompt_messages(example)
    text = apply_template(
        tokenizer,
        messages,
        tools=example.tools,
        chat_template=settings.chat_template,
        add_generation_prompt=True,
    )
    return encode(tokenizer, text)


def render_all(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    settings: RenderSettings = DEFAULT_SETTINGS,
    progress: Callable[[int, int], object] | None = None,
) -> list[Rendered]:
    """`render` for every row.

    Args:
        progress: called now and then with the number of rows done and of all rows.

    Raises:
        DataError: one error for all bad rows: how many they are, and what is wrong with the first five.
    """
    done: list[Rendered] = []
    faults: list[str] = []
    bad = 0
    for i, row in enumerate(rows):
        try:
            done.append(render(row, tokenizer, settings))
        except DataError as error:
            bad += 1
            if len(faults) < SHOWN_ERRORS:
                faults.append(f"row {i}: {error}")
        if progress is not None and ((i + 1) % 64 == 0 or i + 1 == len(rows)):
            progress(i + 1, len(rows))
    if bad:
        more = [f"... and {bad - len(faults)} more"] if bad > len(faults) else []
        lines = "\n  ".join([*faults, *more])
        raise DataError(f"{bad} of {len(rows)} rows cannot be rendered:\n  {lines}")
    return done


def _example(row: Mapping[str, Any], tokenizer: Any, settings: RenderSettings, *, answered: bool) -> Example:
    chat = bool(settings.chat_template or tokenizer.chat_template)
    return to_example(row, settings.text_field, chat=chat, answered=answered)


def _require_fit(example: Example, settings: RenderSettings) -> None:
    if settings.assistant_only_loss and not example.is_chat:
        raise DataError("assistant_only_loss=True needs a conversation, and this row is not one")
    if settings.completion_only_loss and example.text is not None:
        raise DataError("completion_only_loss=True needs an answer, and this row is plain text")


def _prompt_messages(example: Example) -> list[Message]:
    """The conversation up to the answer that is to be generated."""
    messages = example.messages
    if messages is None:
        return example.prompt if isinstance(example.prompt, list) else []
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _segments(example: Example, tokenizer: Any, settings: RenderSettings) -> list[Segment]:
    everything = settings.completion_only_loss is False and not settings.assistant_only_loss
    if example.text is not None:
        return [Segment(example.text, True)]
    if isinstance(example.prompt, str):
        return [Segment(example.prompt, everything), Segment(str(example.completion), True)]
    messages, first = example.messages or [], 0
    if isinstance(example.prompt, list) and isinstance(example.completion, list):
        messages = [*example.prompt, *example.completion]
        first = 0 if settings.completion_only_loss is False else len(example.prompt)
    segments = chat_segments(
        tokenizer,
        messages,
        [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"],
        tools=example.tools,
        chat_template=settings.chat_template,
    )
    return [segment._replace(supervised=True) for segment in segments] if everything else segments


def _lead(tokenizer: Any, segments: Sequence[Segment]) -> list[int]:
    """``[bos]`` where the tokenizer puts one before plain text and the text does not bring its own."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a", verbose=False)["input_ids"][:1] != [bos]:
        return []
    return [] if encode(tokenizer, segments[0].text)[:1] == [bos] else [bos]


def _tokens(tokenizer: Any, segments: Sequence[Segment], lead: list[int]) -> tuple[list[int], list[int]]:
    """Ids and labels, with every segment's start on a token boundary.

    The text up to the end of a segment is tokenized as a whole, as generation would do it. Where a token
    would then straddle the cut, so that the tokens before it change, the segment is tokenized alone.
    """
    ids, labels, text = list(lead), [IGNORE] * len(lead), ""
    for piece, supervised in segments:
        text += piece
        whole = lead + encode(tokenizer, text)
        new = whole[len(ids) :] if whole[: len(ids)] == ids else encode(tokenizer, piece)
        ids += new
        labels += new if supervised else [IGNORE] * len(new)
    return ids, labels
