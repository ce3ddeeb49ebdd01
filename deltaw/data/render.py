"""One row -> token ids and labels: what the model reads, and which of it the loss covers.

Knows nothing of files, batches or models. Four promises, each tested:

- the tokens before an answer are those that generation sees for the same prompt (`render_prompt`);
- the token that ends an answer is always supervised, so that a trained model stops;
- nothing is cut silently: a truncated example says how long it was and how many supervised tokens it lost;
- nothing that a row says becomes a control token: what looks like one is encoded as plain text, and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.data.chat import Segment, apply_template, chat_segments, ends_turn, stop_token_ids
from deltaw.data.encode import control_tokens, encode_parts
from deltaw.data.formats import Example, Message, to_example
from deltaw.data.guard import Guard
from deltaw.data.overlong import blocks, cut_right, shorten_prompt
from deltaw.data.rendered import IGNORE, Rendered
from deltaw.data.rows import Unrendered
from deltaw.errors import ConfigError, DataError, did_you_mean

__all__ = [
    "DEFAULT_SETTINGS",
    "IGNORE",
    "RenderSettings",
    "Rendered",
    "render",
    "render_all",
    "render_examples",
    "render_prompt",
    "stop_token_ids",
]

OVERLONG = ("error", "drop", "truncate_prompt", "truncate")


@dataclass(frozen=True)
class RenderSettings:
    """How rows become tokens; the fields are SFTConfig's.

    Args:
        max_length: longest example in tokens; None is no limit. Plain text that is longer is cut into blocks of it; of
            other rows `overlong` decides.
        completion_only_loss: None puts the loss on the answers where a row has any (a completion, the
            assistant's turns) and on everything for plain text; True is the same, but refuses plain text;
            False puts it on every token.
        assistant_only_loss: the loss covers the assistant's turns and nothing else; refuses rows that are
            not conversations. With ``completion_only_loss=False`` the assistant's turns within the prompt
            count as well.
        text_field: the column of plain text.
        last_turn_only_loss: the loss covers the last answer of a conversation and nothing else.
        dataset_format: of the rows, as `deltaw.data.formats` names them; "auto" looks at their keys.
        overlong: what becomes of an example longer than `max_length`: "error" (cut on the right, which the check
            refuses), "drop", "truncate_prompt" (its prompt is cut from the left, the answer stays whole), or "truncate"
            (cut on the right).
        chat_template: used in place of the tokenizer's own: its text, a name (``deltaw.data.templates``) or a file.
        label_names: the labels of a classification, all of them, in the order of their numbers.
    """

    max_length: int | None = 1024
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    text_field: str = "text"
    last_turn_only_loss: bool = False
    dataset_format: str = "auto"
    overlong: str = "error"
    chat_template: str | None = None
    label_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, run: Any, **changed: Any) -> RenderSettings:
        """As a run's description or a trainer's arguments have it, which name these things alike.

        Args:
            run: with ``max_length``, the ``..._loss`` settings, ``dataset_format``, ``overlong``,
                ``dataset_text_field`` and ``dataset_label_names``.
            changed: fields that shall differ.
        """
        alike = ("max_length", "completion_only_loss", "assistant_only_loss", "last_turn_only_loss", "dataset_format")
        fields = {name: getattr(run, name) for name in (*alike, "overlong")}
        labels = run.dataset_label_names
        fields |= {"text_field": run.dataset_text_field, "label_names": None if labels is None else tuple(labels)}
        return cls(**{**fields, **changed})

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2, or None for no limit; not {self.max_length}")
        if self.overlong not in OVERLONG:
            near = did_you_mean(self.overlong, OVERLONG)
            raise ConfigError(f"overlong = {self.overlong!r} must be one of {', '.join(OVERLONG)}{near}")


DEFAULT_SETTINGS = RenderSettings()


def render(row: Mapping[str, Any], tokenizer: Any, settings: RenderSettings = DEFAULT_SETTINGS) -> Rendered:
    """Token ids and labels of one row, as one example: what is too long is cut on the right.

    Args:
        row: in any format of `deltaw.data.formats`.
        tokenizer: a transformers tokenizer; its chat template renders conversations.
        settings: see `RenderSettings`.

    Raises:
        DataError: the row cannot be understood, or cannot be rendered as the settings ask.
    """
    one = _Row.of(row, tokenizer, settings)
    return dataclasses.replace(cut_right(one.tokens(one.example), settings.max_length), escaped=one.escaped)


def render_examples(
    row: Mapping[str, Any], tokenizer: Any, settings: RenderSettings = DEFAULT_SETTINGS
) -> list[Rendered]:
    """The examples that a row becomes: none if it is dropped, blocks of a long plain text, else one.

    Args:
        row, tokenizer, settings: as for `render`.

    Raises:
        DataError: as `render`; or an answer that does not fit, where only the prompt may be cut.
    """
    one = _Row.of(row, tokenizer, settings)
    whole = one.tokens(one.example)
    limit = settings.max_length
    if limit is None or len(whole[0]) <= limit:
        made = [cut_right(whole, limit)]
    elif one.example.text is not None:
        made = blocks(whole, limit, one.control.bos)
    elif settings.overlong == "drop":
        made = []
    elif settings.overlong == "truncate_prompt":
        ids, labels = shorten_prompt(one.example, one.first_answer, one.tokens, limit)
        lost = labels.count(IGNORE) - len(ids) + len(whole[1]) - whole[1].count(IGNORE)
        made = [Rendered(ids, labels, len(whole[0]), max(0, lost))]
    else:
        made = [cut_right(whole, limit)]
    if one.escaped and made:
        made[0] = dataclasses.replace(made[0], escaped=one.escaped)
    return made


def render_prompt(row: Mapping[str, Any], tokenizer: Any, settings: RenderSettings = DEFAULT_SETTINGS) -> list[int]:
    """The ids from which the answer to a row is generated: exactly those that precede it in `render`.

    The answer itself may be present or absent. Nothing is truncated. Plain text is continued from its end.

    Raises:
        DataError: as `render`.
    """
    one = _Row.of(row, tokenizer, settings, answered=False)
    example = one.example
    if not example.is_chat:
        text = example.prompt if isinstance(example.prompt, str) else example.text or ""
        return one.lead() + one.encode([text])[0]
    messages = example.messages
    if messages is None:
        messages = example.prompt if isinstance(example.prompt, list) else []
    elif messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = apply_template(
        tokenizer,
        messages,
        tools=example.tools,
        chat_template=settings.chat_template,
        add_generation_prompt=True,
    )
    return one.encode([text])[0]


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
    faults = Unrendered()
    for i, row in enumerate(rows):
        try:
            done.append(render(row, tokenizer, settings))
        except DataError as error:
            faults.add(row, i, error)
        if progress is not None and ((i + 1) % 64 == 0 or i + 1 == len(rows)):
            progress(i + 1, len(rows))
    faults.raise_if_any(len(rows))
    return done


@dataclass
class _Row:
    """One row on its way to tokens."""

    example: Example  # with marks in it, where it is guarded
    tokenizer: Any
    settings: RenderSettings
    guard: Guard | None

    @classmethod
    def of(cls, row: Mapping[str, Any], tokenizer: Any, settings: RenderSettings, *, answered: bool = True) -> _Row:
        example = to_example(
            row,
            settings.text_field,
            chat=bool(settings.chat_template or tokenizer.chat_template),
            answered=answered,
            dataset_format=settings.dataset_format,
            label_names=settings.label_names,
        )
        if answered:
            _require_fit(example, settings)
        example = _unwrapped(example, tokenizer, answered)
        guard = Guard.over(tokenizer, *_strings(example))
        return cls(example if guard is None else _hidden(example, guard), tokenizer, settings, guard)

    @property
    def escaped(self) -> int:
        return 0 if self.guard is None else self.guard.count

    @property
    def control(self) -> Any:
        return control_tokens(self.tokenizer)

    def encode(self, parts: Sequence[str]) -> list[list[int]]:
        return encode_parts(self.tokenizer, parts, None if self.guard is None else self.guard.encode)

    def lead(self) -> list[int]:
        """``[bos]`` where the tokenizer puts one before plain text."""
        bos = self.control.bos
        return [] if bos is None else [bos]

    def tokens(self, example: Example) -> tuple[list[int], list[int]]:
        """Ids and labels of the example, uncut."""
        try:
            return self._tokens(example)
        except DataError as error:
            raise error if self.guard is None else self.guard.show_error(error) from error

    def _tokens(self, example: Example) -> tuple[list[int], list[int]]:
        segments = self._segments(example)
        lead = [] if example.is_chat else self.lead()
        ids, labels = list(lead), [IGNORE] * len(lead)
        for new, (_, supervised) in zip(self.encode([text for text, _ in segments]), segments, strict=True):
            ids += new
            labels += new if supervised else [IGNORE] * len(new)
        # a template closes the turn itself; where nothing does, eos must, or the model never learns to stop
        closed = example.is_chat and ends_turn(self.tokenizer, segments[-1].text)
        if segments[-1].supervised and not closed:
            if self.tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has no eos token, so no example can end: set tokenizer.eos_token")
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        bos = self.tokenizer.bos_token_id
        if example.is_chat and bos is not None and bos != self.tokenizer.eos_token_id and ids[:2] == [bos, bos]:
            raise DataError("the chat template writes BOS twice at the beginning: remove one from the template")
        labels[:1] = [IGNORE] * len(labels[:1])  # nothing precedes the first token, so nothing predicts it
        return ids, labels

    def _segments(self, example: Example) -> list[Segment]:
        everything = self.settings.completion_only_loss is False and not self.settings.assistant_only_loss
        if example.text is not None:
            return [Segment(example.text, True)]
        if isinstance(example.prompt, str):
            return [Segment(example.prompt, everything), Segment(str(example.completion), True)]
        messages, answers = self._answers(example)
        segments = chat_segments(
            self.tokenizer,
            messages,
            answers,
            tools=example.tools,
            chat_template=self.settings.chat_template,
        )
        return [segment._replace(supervised=True) for segment in segments] if everything else segments

    def _answers(self, example: Example) -> tuple[list[Message], list[int]]:
        """All messages, and the indices of those that the loss covers."""
        messages, first = example.messages or [], 0
        if isinstance(example.prompt, list) and isinstance(example.completion, list):
            messages = [*example.prompt, *example.completion]
            first = 0 if self.settings.completion_only_loss is False else len(example.prompt)
        answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        return messages, answers[-1:] if self.settings.last_turn_only_loss else answers

    @property
    def first_answer(self) -> int:
        """Index of the first message that the loss covers; 0 where nothing is a message."""
        answers = self._answers(self.example)[1] if self.example.is_chat else []
        return answers[0] if answers else 0


def _require_fit(example: Example, settings: RenderSettings) -> None:
    if settings.assistant_only_loss and not example.is_chat:
        raise DataError("assistant_only_loss=True needs a conversation, and this row is not one")
    if settings.completion_only_loss and example.text is not None:
        raise DataError("completion_only_loss=True needs an answer, and this row is plain text")


def _unwrapped(example: Example, tokenizer: Any, answered: bool) -> Example:
    """Without the BOS at the very start of a plain text and the EOS at its end: each is added as a token, once."""
    if example.is_chat:
        return example
    bos = tokenizer.bos_token if control_tokens(tokenizer).bos is not None else None
    eos = tokenizer.eos_token if answered else None
    changed = {}
    for name, begins, ends in (("text", True, True), ("prompt", True, False), ("completion", False, True)):
        text = getattr(example, name)
        if isinstance(text, str):
            text = text.removeprefix(bos) if begins and bos else text
            changed[name] = text.removesuffix(eos) if ends and eos else text
    return dataclasses.replace(example, **changed)


def _strings(example: Example) -> tuple[list[str], list[Any]]:
    """The texts of a row, and what else it holds. Roles are left out: they are known words."""
    texts = [text for text in (example.text, example.prompt, example.completion) if isinstance(text, str)]
    others: list[Any] = [example.tools] if example.tools else []
    for messages in (example.messages, example.prompt, example.completion):
        for message in messages if isinstance(messages, list) else ():
            for name, value in message.items():
                if isinstance(value, str):
                    if name != "role":
                        texts.append(value)
                else:
                    others.append(value)
    return texts, others


def _hidden(example: Example, guard: Guard) -> Example:
    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return guard.hide(value)
        return [
            {
                name: item if name == "role" else guard.hide(item) if isinstance(item, str) else guard.hide_all(item)
                for name, item in message.items()
            }
            for message in value
        ]

    texts = {
        name: hidden(value)
        for name in ("prompt", "completion", "messages", "text")
        if (value := getattr(example, name)) is not None
    }
    return dataclasses.replace(example, **texts, tools=example.tools and guard.hide_all(example.tools))
