"""Conversations of any dialect -> messages with known roles and string content. Knows nothing of rows or templates.

ShareGPT's turns (``from``, ``value``) become OpenAI's (``role``, ``content``): a ``function_call`` becomes the
assistant's ``tool_calls``, an ``observation`` the ``tool``'s answer. Arguments of a call that are written as a JSON
string, as OpenAI's API does it, become the mapping that chat templates expect (and that vLLM makes of them too).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.errors import DataError, did_you_mean

__all__ = ["ROLES", "SHAREGPT_ROLES", "Message", "messages_of", "sharegpt_turns", "string_of", "tools_of"]

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "tool"), "tool"),
}


def messages_of(value: Any, where: str) -> list[Message]:
    """Plain dicts with a known role and a string as content; keys that are None are dropped.

    Raises:
        DataError: no list, an empty one, an unknown role, content that is no string, broken tool calls.
    """
    checked: list[Message] = []
    for i, message in enumerate(_sequence(value, where)):
        place = f"{where}[{i}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise DataError(f"{place} must be a mapping with the keys 'role' and 'content'")
        role = message["role"]
        if role not in ROLES:
            raise DataError(f"{place} has the role {role!r}; known are {list(ROLES)}{did_you_mean(str(role), ROLES)}")
        kept = {key: item for key, item in message.items() if item is not None}
        if calls := kept.pop("tool_calls", None):
            kept["tool_calls"] = _calls(calls, place)
            if role != "assistant":
                raise DataError(f"{place} is of the role {role!r} and has tool_calls; only the assistant calls tools")
            kept.setdefault("content", "")
        if not isinstance(kept.get("content"), str):
            kind = type(kept.get("content")).__name__
            raise DataError(f"{place} has content of type {kind}; only strings can be trained on")
        checked.append(kept)
    return checked


def sharegpt_turns(value: Any, where: str) -> list[Any]:
    """ShareGPT's turns as messages, which `messages_of` then checks; turns that are messages already stay.

    Raises:
        DataError: a turn without its keys, one from nobody that is known, a call that is not JSON.
    """
    turns: list[Any] = []
    for i, turn in enumerate(_sequence(value, where)):
        place = f"{where}[{i}]"
        if isinstance(turn, Mapping) and turn.get("from") is None and turn.get("role") is not None:
            turns.append(turn)  # some sets keep OpenAI's keys under ShareGPT's column
            continue
        if not isinstance(turn, Mapping) or turn.get("from") is None or "value" not in turn:
            raise DataError(f"{place} needs the keys 'from' and 'value'")
        role = SHAREGPT_ROLES.get(str(turn["from"]))
        if role is None:
            raise DataError(
                f"{place} is from {turn['from']!r}; known are {sorted(SHAREGPT_ROLES)}"
                + did_you_mean(str(turn["from"]), SHAREGPT_ROLES)
            )
        if role == "call":
            turns.append({"role": "assistant", "content": "", "tool_calls": _written_calls(turn["value"], place)})
        else:
            turns.append({"role": role, "content": turn["value"]})
    return turns


def tools_of(value: Any, *, wrapped: bool = False) -> list[Any] | None:
    """Tool schemas as a list; a JSON string is read, because columnar files cannot hold free schemas.

    Args:
        wrapped: bare schemas (name, description, parameters), as ShareGPT sets have them, become
            ``{"type": "function", "function": schema}``, which is what chat templates are written for.

    Raises:
        DataError: no JSON, or no list.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"tools is not valid JSON: {error}") from error
    if value is not None and not isinstance(value, list):
        raise DataError(f"tools must be a list of schemas, not {type(value).__name__}")
    if value and wrapped:
        bare = [isinstance(tool, Mapping) and "name" in tool and "function" not in tool for tool in value]
        value = [{"type": "function", "function": tool} if b else tool for tool, b in zip(value, bare, strict=True)]
    return value or None


def string_of(row: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    """The string in a column. Raises DataError for anything else; an optional one that is absent is ``""``."""
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{key} must be a string, not {type(value).__name__}")
    return value


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(f"{where} must be a list of messages, not {type(value).__name__}")
    if not value:
        raise DataError(f"{where} is an empty list")
    return value


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise DataError(f"{place} has tool_calls that are not a list of mappings")
    checked = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place} has a tool call without the name of its function")
        function = {**function, "arguments": _arguments(function.get("arguments"))}
        checked.append({**call, "function": function} if "function" in call else function)
    return checked


def _arguments(value: Any) -> Any:
    """A mapping that was written as JSON is read; anything else stays as it is."""
    if value is None:
        return {}
    if isinstance(value, str):
        try:
            read = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
        return read if isinstance(read, dict) else value
    return value


def _written_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """One call, or a list of them, as JSON with the keys name and arguments."""
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place} is a function call that is not valid JSON: {error}") from error
    calls = read if isinstance(read, list) else [read]
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"{place} is a function call without a name: write {{'name': ..., 'arguments': {{...}}}}")
    return [call if "function" in call else {"type": "function", "function": dict(call)} for call in calls]
