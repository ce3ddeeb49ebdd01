"""A conversation -> segments of text, each supervised or not, and the tokens that end a turn.

Knows nothing of rows or ids. The chat template is asked to render prefixes of the conversation, as it does
when the model is used, and every cut is verified against the full rendering: so no template needs
``{% generation %}`` marks, and one that rewrites earlier turns is found out and refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from deltaw.data.formats import Message
from deltaw.errors import DataError

__all__ = ["Segment", "apply_template", "chat_segments", "encode", "ends_turn", "stop_token_ids"]


class Segment(NamedTuple):
    """A piece of the text, and whether the loss covers it."""

    text: str
    supervised: bool


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of the text alone: nothing added before or after it."""
    try:
        return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    except (TypeError, UnicodeError) as error:
        bad = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
        if bad is None:
            raise
        raise DataError(f"character {bad} of its text is half a character (a lone surrogate): clean it") from error


def apply_template(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: list[Any] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text. Raises DataError where there is no template or it refuses the messages."""
    if not (chat_template or tokenizer.chat_template):
        raise DataError(
            "messages need a chat template and the tokenizer has none: give chat_template=..., use the "
            "instruct version of the model, or write the rows as prompt and completion strings"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # a template is a program of its own: it may raise anything
        roles = [message["role"] for message in messages]
        raise DataError(f"the chat template refuses a conversation of roles {roles}: {error}") from error


def chat_segments(
    tokenizer: Any,
    messages: Sequence[Message],
    supervised: Collection[int],
    *,
    tools: list[Any] | None = None,
    chat_template: str | None = None,
) -> list[Segment]:
    """The rendered conversation, cut where the supervised turns start and end.

    A supervised segment runs from the first character after the generation prompt to the end-of-turn token,
    that token included; white space that the template puts behind it belongs to the next segment, and is
    dropped at the end of the conversation, where generation has stopped already.

    Args:
        messages: the whole conversation.
        supervised: indices of the assistant messages that the loss covers.

    Raises:
        DataError: the template is not prefix-stable, or leaves tools or tool calls out; or the conversation
            starts with an answer to nothing.
    """
    if 0 in supervised:
        raise DataError("the conversation starts with the assistant, so nothing prompts that turn: drop it")

    def rendered(end: int, add_generation_prompt: bool) -> str:
        text = apply_template(
            tokenizer,
            messages[:end],
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
        )
        if not full.startswith(text):
            raise DataError(_unstable(full, text, end, add_generation_prompt))
        return text

    full = apply_template(tokenizer, messages, tools=tools, chat_template=chat_template)
    _require_tools(full, messages, tools)
    segments: list[Segment] = []
    cursor = 0
    for index in sorted(supervised):
        start = len(rendered(index, True))
        turn = full[start:] if index == len(messages) - 1 else rendered(index + 1, False)[start:]
        if ends_turn(tokenizer, turn.rstrip()):
            turn = turn.rstrip()
        segments += [Segment(full[cursor:start], False), Segment(turn, True)]
        cursor = start + len(turn)
    if full[cursor:].strip():
        segments.append(Segment(full[cursor:], False))
    return segments


def ends_turn(tokenizer: Any, text: str) -> bool:
    """Whether the text ends with a special token, which is how a template closes a turn."""
    return text.endswith(tuple(tokenizer.all_special_tokens)) or any(
        token.special and text.endswith(token.content) for token in tokenizer.added_tokens_decoder.values()
    )


def stop_token_ids(tokenizer: Any, chat_template: str | None = None) -> list[int]:
    """Ids that end an answer: the tokenizer's eos, and the token that the template closes a turn with.

    Generation must stop on each of them: some models end a turn with another token than their eos.
    """
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if chat_template or tokenizer.chat_template:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = apply_template(tokenizer, probe, chat_template=chat_template).rstrip()
        if ends_turn(tokenizer, text):
            stops.append(encode(tokenizer, text)[-1])
    return list(dict.fromkeys(stops))


def _unstable(full: str, text: str, end: int, add_generation_prompt: bool) -> str:
    at = next((i for i, (a, b) in enumerate(zip(full, text, strict=False)) if a != b), min(len(full), len(text)))
    suffix = " and the generation prompt" if add_generation_prompt else ""
    return (
        f"the chat template is not prefix-stable: the first {end} messages{suffix} render to "
        f"{text[max(0, at - 20) : at + 20]!r} where the whole conversation has "
        f"{full[max(0, at - 20) : at + 20]!r}, so the turns cannot be told apart safely; give a "
        "chat_template that keeps earlier turns as they are, or write the row as prompt and completion "
        "messages, which trains the last turn only"
    )


def _require_tools(full: str, messages: Sequence[Message], tools: list[Any] | None) -> None:
    """Templates without tool support drop tools silently: then the model would be trained on thin air."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    names = [
        inner.get("name")
        for outer in [*calls, *(tools or [])]
        if isinstance(outer, dict) and isinstance(inner := outer.get("function", outer), dict)
    ]
    lost = sorted({str(name) for name in names if name and str(name) not in full})
    if lost:
        raise DataError(f"the chat template leaves out the tools {lost}: give a chat_template that renders them")
