"""What a row of a dataset means: its format is detected by its keys, then it becomes one `Example`.

Knows nothing of tokenizers, templates or ids. Accepted rows, the first that fits wins:

    messages            [{"role": ..., "content": ...}, ...]               OpenAI chat
    conversations       [{"from": ..., "value": ...}, ...]                 ShareGPT
    prompt, completion  two strings, or two lists of messages              TRL
    instruction, output and an optional input, system                      Alpaca
    text                one string, under a name of the caller's choice

Alpaca comes before text on purpose: published Alpaca rows carry a ready `text` column too, and training on
it would put the loss on the prompt. A key whose value is None counts as absent, because columnar files fill
the keys that a row lacks with None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaw.errors import DataError, did_you_mean

__all__ = ["Example", "Message", "detect_format", "to_example"]

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
ACCEPTED = "messages | conversations | prompt + completion | instruction + output (+ input) | {text}"


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
    """``"messages"``, ``"prompt_completion"``, ``"alpaca"`` or ``"text"``; ShareGPT counts as messages.

    Args:
        row: one row of a dataset.
        text_field: the column that holds plain text.
        answered: False accepts a prompt or an instruction without its answer, for generation.

    Raises:
        DataError: no format fits; the message names the row's keys and the accepted formats.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a mapping of names to values, not {type(row).__name__}")
    keys = {key for key, value in row.items() if value is not None}
    if "messages" in keys or "conversations" in keys:
        return "messages"
    if "prompt" in keys and ("completion" in keys or not answered):
        return "prompt_completion"
    if "instruction" in keys and ("output" in keys or not answered):
        return "alpaca"
    if text_field in keys:
        return "text"
    known = ("messages", "conversations", "prompt", "completion", "instruction", "output", text_field)
    missing = [known_key for known_key in known if known_key not in keys]
    hints = [f"{key!r}{hint[1:]}" for key in map(str, row) if (hint := did_you_mean(key, missing, n=1))]
    empty = [key for key in row if row[key] is None]
    raise DataError(
        f"its format is unknown: keys {list(row)}"
        + (f", of which {empty} are null" if empty else "")
        + f"; accepted are {ACCEPTED.format(text=text_field)}"
        + (f" ({' '.join(hints)})" if hints else "")
    )


def to_example(
    row: Mapping[str, Any], text_field: str = "text", *, chat: bool = True, answered: bool = True
) -> Example:
    """The row in normal form.

    Args:
        row: one row, in any format of `detect_format`.
        text_field: the column that holds plain text.
        chat: an Alpaca row becomes one user and one assistant turn; False writes it as plain text with
            headed sections, for a tokenizer that has no chat template.
        answered: False accepts a row without its answer, for generation.

    Raises:
        DataError: an unknown format, a wrong type, an unknown role, an empty conversation.
    """
    kind = detect_format(row, text_field, answered=answered)
    tools = _tools(row.get("tools"))
    if kind == "messages":
        if row.get("messages") is not None:
            return Example(messages=_messages(row["messages"], "messages"), tools=tools)
        return Example(messages=_from_sharegpt(row), tools=tools)
    if kind == "prompt_completion":
        return _prompt_completion(row, tools)
    if kind == "alpaca":
        return _alpaca(row, chat)
    return Example(text=_string(row, text_field))


def _prompt_completion(row: Mapping[str, Any], tools: list[Any] | None) -> Example:
    prompt, completion = row["prompt"], row.get("completion")
    if completion is not None and isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(
            f"prompt is a {type(prompt).__name__} and completion a {type(completion).__name__}: "
            "both must be strings, or both lists of messages"
        )
    if isinstance(prompt, str):
        return Example(prompt=prompt, completion=completion)
    answer = None if completion is None else _messages(completion, "completion")
    if answer is not None and answer[0]["role"] != "assistant":
        raise DataError(f"completion starts with the role {answer[0]['role']!r}; it must start with 'assistant'")
    return Example(prompt=_messages(prompt, "prompt"), completion=answer, tools=tools)


def _alpaca(row: Mapping[str, Any], chat: bool) -> Example:
    if row.get("history"):
        raise DataError("its 'history' column would be lost: write the earlier turns as messages")
    instruction, context = _string(row, "instruction"), _string(row, "input", optional=True)
    system, output = _string(row, "system", optional=True), row.get("output")
    if output is not None:
        output = _string(row, "output")
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


def _from_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    turns = _sequence(row["conversations"], "conversations")
    messages: list[Any] = []
    system = _string(row, "system", optional=True)
    if system:
        messages.append({"role": "system", "content": system})
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            # some sets keep OpenAI's keys under ShareGPT's column
            if isinstance(turn, Mapping) and "role" in turn:
                messages.append(turn)
                continue
            raise DataError(f"conversations[{i}] needs the keys 'from' and 'value'")
        role = SHAREGPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise DataError(
                f"conversations[{i}] is from {turn['from']!r}; known are {sorted(SHAREGPT_ROLES)}"
                + did_you_mean(str(turn["from"]), SHAREGPT_ROLES)
            )
        messages.append({"role": role, "content": turn["value"]})
    return _messages(messages, "conversations")


def _messages(value: Any, where: str) -> list[Message]:
    """Plain dicts with a known role and a string as content; keys that are None are dropped."""
    checked: list[Message] = []
    for i, message in enumerate(_sequence(value, where)):
        place = f"{where}[{i}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise DataError(f"{place} must be a mapping with the keys 'role' and 'content'")
        role = message["role"]
        if role not in ROLES:
            raise DataError(f"{place} has the role {role!r}; known are {list(ROLES)}{did_you_mean(str(role), ROLES)}")
        kept = {key: item for key, item in message.items() if item is not None}
        calls = kept.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(c, Mapping) for c in calls)):
            raise DataError(f"{place} has tool_calls that are not a list of mappings")
        if role == "assistant" and calls:
            kept.setdefault("content", "")
        if not isinstance(kept.get("content"), str):
            kind = type(kept.get("content")).__name__
            raise DataError(f"{place} has content of type {kind}; only strings can be trained on")
        checked.append(kept)
    return checked


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(f"{where} must be a list of messages, not {type(value).__name__}")
    if not value:
        raise DataError(f"{where} is an empty list")
    return value


def _string(row: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{key} must be a string, not {type(value).__name__}")
    return value


def _tools(value: Any) -> list[Any] | None:
    """Tool schemas as a list; a JSON string is read, because columnar files cannot hold free schemas."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"tools is not valid JSON: {error}") from error
    if value is not None and not isinstance(value, list):
        raise DataError(f"tools must be a list of schemas, not {type(value).__name__}")
    return value or None
