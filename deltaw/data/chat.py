"""A conversation -> segments of text, each supervised or not, and the tokens that end a turn.

Knows nothing of rows or ids. The chat template is asked to render prefixes of the conversation, as it does when the
model is used, and every cut is verified against the full rendering: so no template needs ``{% generation %}`` marks,
and one that rewrites earlier turns is found out and refused. Where a template has such marks, they say which part of a
turn the model writes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from deltaw.data.encode import control_tokens, encode
from deltaw.data.formats import Message
from deltaw.data.templates import template_text
from deltaw.errors import DataError

__all__ = ["Segment", "apply_template", "chat_segments", "ends_turn", "stop_token_ids"]

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Segment(NamedTuple):
    """A piece of the text, and whether the loss covers it."""

    text: str
    supervised: bool


def apply_template(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: list[Any] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text, rendered in transformers' sandbox, where a template can change and reach nothing.

    Raises:
        DataError: there is no template, or it refuses the messages.
        ConfigError: ``chat_template`` is neither a template nor a name nor a file.
    """
    template = _template(tokenizer, chat_template, tools)
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # a template is a program of its own: it may raise anything
        raise _refused(messages, error) from error


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
    dropped at the end of the conversation, where generation has stopped already. Of a turn with ``{% generation %}``
    marks in it, the marked parts are supervised, and the token that ends the turn in any case.

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

    template = _template(tokenizer, chat_template, tools)
    marks: list[tuple[int, int]] | None = None
    if _MARKED.search(template):
        full, marks = _with_marks(tokenizer, messages, tools, template)
    else:
        full = apply_template(tokenizer, messages, tools=tools, chat_template=template)
    _require_tools(full, messages, tools)
    segments: list[Segment] = []
    cursor = 0
    for index in sorted(supervised):
        start = len(rendered(index, True))
        end = len(full) if index == len(messages) - 1 else len(rendered(index + 1, False))
        turn = full[start:end]
        if ends_turn(tokenizer, turn.rstrip()):
            end = start + len(turn.rstrip())
        spans = [(start, end)] if marks is None else _marked(tokenizer, full, marks, start, end, index)
        for begin, stop in spans:
            segments += [Segment(full[cursor:begin], False), Segment(full[begin:stop], True)]
            cursor = stop
    if full[cursor:].strip():
        segments.append(Segment(full[cursor:], False))
    return segments


def ends_turn(tokenizer: Any, text: str) -> bool:
    """Whether the text ends with a special token, which is how a template closes a turn."""
    return text.endswith(control_tokens(tokenizer).closers)


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


def _template(tokenizer: Any, chat_template: str | None, tools: list[Any] | None) -> str:
    template = template_text(tokenizer, chat_template, tools)
    if not template:
        raise DataError(
            "messages need a chat template and the tokenizer has none: give chat_template=... (chatml, alpaca, ...), "
            "use the instruct version of the model, or write the rows as prompt and completion strings"
        )
    return template


def _refused(messages: Sequence[Message], error: Exception) -> DataError:
    roles = [message["role"] for message in messages]
    return DataError(f"the chat template refuses a conversation of roles {roles}: {error}")


# --- {% generation %} marks ---------------------------------------------------------------------------------


def _with_marks(
    tokenizer: Any, messages: Sequence[Message], tools: list[Any] | None, template: str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation, and the stretches of it that the template marks as the model's."""
    try:
        rendered: Any = render_jinja_template(
            [list(messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise _refused(messages, error) from error
    texts, marks = rendered
    return texts[0], marks[0]


def _marked(
    tokenizer: Any, full: str, marks: Sequence[tuple[int, int]], start: int, end: int, index: int
) -> list[tuple[int, int]]:
    """What is marked between two places of the text, and the end-of-turn token behind it if it is not."""
    inside = [(max(a, start), min(b, end)) for a, b in marks if max(a, start) <= min(b, end)]
    if not inside:
        raise DataError(f"the chat template's {{% generation %}} marks leave out message {index}, an answer")
    closings = [text for text in control_tokens(tokenizer).closers if full.endswith(text, start, end)]
    closing = max(closings, key=len, default="")
    last, stop = inside[-1][1], end - len(closing)
    if closing and last <= stop:
        if full[last:stop].strip():
            inside.append((stop, end))
        else:
            inside[-1] = (inside[-1][0], end)
    return [(a, b) for a, b in inside if a < b]


def _unstable(full: str, text: str, end: int, add_generation_prompt: bool) -> str:
    at = next((i for i, (a, b) in enumerate(zip(full, text, strict=False)) if a != b), min(len(full), len(text)))
    suffix = " and the generation prompt" if add_generation_prompt else ""
    return (
        f"the chat template is not prefix-stable, it rewrites earlier turns: the first {end} messages{suffix} render "
        f"to {text[max(0, at - 20) : at + 20]!r} where the whole conversation has "
        f"{full[max(0, at - 20) : at + 20]!r}, so earlier answers would be learned as they are never asked for: train "
        "the last answer only (last_turn_only_loss: true), or give a chat_template that keeps earlier turns"
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
