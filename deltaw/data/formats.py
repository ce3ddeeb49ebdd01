"""What a row of a dataset means: its format is named or detected by its keys, then it becomes one `Example`.

Knows nothing of tokenizers, templates or ids. Formats by name; the first that fits wins:

    messages            messages: [{"role": ..., "content": ...}, ...]     OpenAI chat, with tools and tool calls
    preference          chosen, rejected and an optional prompt            TRL's pairs: read, never trained on here
    sharegpt            conversations: [{"from": ..., "value": ...}, ...]  and an optional system, tools
    prompt_completion   prompt, completion: strings, or lists of messages  TRL
    alpaca              instruction, output and an optional input, system  Alpaca
    classification      a text and a label                                 answered with the name of the label
    text                one string, under a name of the caller's choice

Alpaca comes before text on purpose: published Alpaca rows carry a ready `text` column too, and training on
it would put the loss on the prompt. A key whose value is None counts as absent, because columnar files fill
the keys that a row lacks with None.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeVar

from deltaw.data.labels import LABEL, label_of, labels_in, question
from deltaw.data.messages import Message, messages_of, sharegpt_turns, string_of, tools_of
from deltaw.errors import DataError, did_you_mean

__all__ = [
    "FORMATS",
    "Example",
    "Message",
    "columns_read",
    "count_formats",
    "detect_format",
    "to_example",
    "with_labels",
]

Settings = TypeVar("Settings")

#: name -> (columns a row must have, columns it may have); {text} is the text column
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools",)),
    "preference": (("chosen", "rejected"), ("prompt", "conversations", "system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "prompt_completion": (("prompt", "completion"), ("tools",)),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "classification": (("{text}", LABEL), ()),
    "text": (("{text}",), ()),
}
#: the columns of an answer: a row to generate from may lack them
ANSWERS = ("completion", "output", LABEL)
ACCEPTED = (
    "messages | conversations | prompt + completion | instruction + output (+ input) | {text} + label | {text} | "
    "chosen + rejected"
)


@dataclass(frozen=True)
class Example:
    """One row in normal form: `messages`, or `prompt` and `completion`, or `text`; the others are None.

    `completion` is None only for a row that has no answer yet (a prompt to generate from). `tools` are the
    row's tool schemas, handed to the chat template as they are.
    """

    prompt: str | list[Message] | None = None
    completion: str | list[Message] | None = None
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[Any] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether the example is made of messages and therefore needs a chat template."""
        return self.messages is not None or isinstance(self.prompt, list)


def detect_format(row: Mapping[str, Any], text_field: str = "text", *, answered: bool = True) -> str:
    """The name of the row's format, one of `FORMATS`.

    Args:
        row: one row of a dataset.
        text_field: the column that holds plain text.
        answered: False accepts a prompt or an instruction without its answer, for generation. A text without a
            label is then plain text: name the format where it is to be classified.

    Raises:
        DataError: no format fits; the message names the row's keys and the accepted formats.
    """
    keys = _keys(row)
    if name := _fitting(keys, text_field, answered):
        return name
    known = {key for name in FORMATS for key in columns(name, text_field)[0]}
    missing = sorted(known - keys)
    hints = [f"{key!r}{hint[1:]}" for key in map(str, row) if (hint := did_you_mean(key, missing, n=1))]
    empty = [key for key in row if row[key] is None]
    raise DataError(
        f"its format is unknown: keys {list(row)}"
        + (f", of which {empty} are null" if empty else "")
        + f"; accepted are {ACCEPTED.format(text=text_field)}"
        + (f" ({' '.join(hints)})" if hints else "")
    )


def to_example(
    row: Mapping[str, Any],
    text_field: str = "text",
    *,
    chat: bool = True,
    answered: bool = True,
    dataset_format: str = "auto",
    label_names: Sequence[str] | None = None,
) -> Example:
    """The row in normal form.

    Args:
        row: one row, in any of `FORMATS`.
        text_field: the column that holds plain text.
        chat: an Alpaca row becomes one user and one assistant turn; False writes it as plain text with
            headed sections, for a tokenizer that has no chat template.
        answered: False accepts a row without its answer, for generation.
        dataset_format: what the row is; "auto" looks at its keys.
        label_names: the labels of a classification, all of them, in the order of their numbers.

    Raises:
        DataError: an unknown format, a wrong type, an unknown role, an empty conversation; preference pairs.
    """
    if dataset_format == "auto":
        kind = detect_format(row, text_field, answered=answered)
    else:
        kind = _named(row, dataset_format, text_field, answered)
    if kind == "preference":
        raise DataError(
            "it is a preference pair (chosen, rejected), and supervised training would lose which answer is the "
            "better: train on pairs with DPO (deltaw.data.preference_rows makes rows for TRL's DPOTrainer), or "
            "write the chosen answer as 'completion'"
        )
    if kind == "messages":
        return Example(messages=messages_of(row["messages"], "messages"), tools=tools_of(row.get("tools")))
    if kind == "sharegpt":
        return _sharegpt(row)
    if kind == "prompt_completion":
        return _prompt_completion(row)
    if kind == "alpaca":
        return _alpaca(row, chat)
    if kind == "classification":
        label = label_of(row, label_names) if answered or row.get(LABEL) is not None else None
        return _alpaca({"instruction": question(string_of(row, text_field), label_names), "output": label}, chat)
    return Example(text=string_of(row, text_field))


@cache
def columns(name: str, text_field: str = "text") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that a format needs, and those that it also reads."""
    needed, optional = FORMATS[name]
    return tuple(key.format(text=text_field) for key in needed), optional


def count_formats(rows: Iterable[Mapping[str, Any]], text_field: str = "text") -> Counter[str]:
    """How many rows have each format; those that have none are left to `to_example`, which says why."""
    counts: Counter[str] = Counter()
    for row in rows:
        try:
            counts[detect_format(row, text_field)] += 1
        except DataError:
            continue
    return counts


def with_labels(settings: Settings, rows: Iterable[Mapping[str, Any]]) -> Settings:
    """The settings with the names of all labels, where rows are a classification and the names are not given.

    Args:
        settings: a `RenderSettings`.
        rows: those to train on; evaluation takes the names that training used.

    Raises:
        DataError: the labels are numbers, or no classes.
    """
    given: Any = settings
    if given.label_names is not None or given.dataset_format not in ("auto", "classification"):
        return settings

    def labelled(row: Mapping[str, Any]) -> bool:
        if row.get(LABEL) is None or row.get(given.text_field) is None:
            return False
        return given.dataset_format != "auto" or detect_format(row, given.text_field) == "classification"

    found = labels_in(row for row in rows if isinstance(row, Mapping) and labelled(row))
    return dataclasses.replace(given, label_names=tuple(found)) if found else settings


def columns_read(name: str, text_field: str = "text") -> frozenset[str]:
    """Every column that a format looks at; what else a row has is read by nothing."""
    needed, optional = columns(name, text_field)
    return frozenset(needed + optional)


@lru_cache(maxsize=1024)
def _fitting(keys: frozenset[Any], text_field: str, answered: bool) -> str | None:
    """The first format whose columns are there."""
    for name in FORMATS:
        required, _ = columns(name, text_field)
        if all(key in keys or (not answered and key in ANSWERS and key != LABEL) for key in required):
            return name
    return None


def _keys(row: Any) -> frozenset[Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a mapping of names to values, not {type(row).__name__}")
    return frozenset(key for key, value in row.items() if value is not None)


def _named(row: Mapping[str, Any], name: str, text_field: str, answered: bool) -> str:
    """A format that was asked for, if the row has what it takes."""
    if name not in FORMATS:
        raise DataError(f"dataset_format {name!r} is unknown: auto, {', '.join(FORMATS)}{did_you_mean(name, FORMATS)}")
    needed, _ = columns(name, text_field)
    keys = _keys(row)
    lacks = [key for key in needed if key not in keys and (answered or key not in ANSWERS)]
    if lacks:
        hints = [f"{key!r} is not there{hint}" for key in lacks if (hint := did_you_mean(key, map(str, keys), n=1))]
        null = [key for key in lacks if key in row]
        raise DataError(
            f"dataset_format is {name!r}, which needs {' and '.join(needed)}: the row lacks {lacks}; its keys are "
            f"{list(row)}"
            + (f", of which {null} are null" if null else "")
            + (f" ({'; '.join(hints)})" if hints else "")
        )
    return name


def _sharegpt(row: Mapping[str, Any]) -> Example:
    system = string_of(row, "system", optional=True)
    head = [{"role": "system", "content": system}] if system else []
    turns = [*head, *sharegpt_turns(row["conversations"], "conversations")]
    return Example(messages=messages_of(turns, "conversations"), tools=tools_of(row.get("tools"), wrapped=True))


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt, completion = row["prompt"], row.get("completion")
    if completion is not None and isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(
            f"prompt is a {type(prompt).__name__} and completion a {type(completion).__name__}: "
            "both must be strings, or both lists of messages"
        )
    if isinstance(prompt, str):
        return Example(prompt=prompt, completion=completion)
    answer = None if completion is None else messages_of(completion, "completion")
    if answer is not None and answer[0]["role"] != "assistant":
        raise DataError(f"completion starts with the role {answer[0]['role']!r}; it must start with 'assistant'")
    return Example(prompt=messages_of(prompt, "prompt"), completion=answer, tools=tools_of(row.get("tools")))


def _alpaca(row: Mapping[str, Any], chat: bool) -> Example:
    if row.get("history"):
        raise DataError("its 'history' column would be lost: write the earlier turns as messages")
    instruction, context = string_of(row, "instruction"), string_of(row, "input", optional=True)
    system, output = string_of(row, "system", optional=True), row.get("output")
    if output is not None:
        output = string_of(row, "output")
    if chat:
        user = f"{instruction}\n\n{context}" if context else instruction
        head = [{"role": "system", "content": system}] if system else []
        return Example(
            prompt=[*head, {"role": "user", "content": user}],
            completion=None if output is None else [{"role": "assistant", "content": output}],
        )
    sections = [("### Instruction:", instruction), ("### Input:", context)]
    body = "".join(f"{title}\n{text}\n\n" for title, text in sections if text)
    return Example(prompt=(f"{system}\n\n" if system else "") + body + "### Response:\n", completion=output)
