"""Preference pairs: validated, and written as TRL's preference trainers take them. Nothing here trains on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltaw.data.messages import Message, messages_of, sharegpt_turns, string_of, tools_of
from deltaw.data.rows import Fault, Row, raise_faults, where
from deltaw.errors import DataError

__all__ = ["preference_rows", "to_preference"]


def to_preference(row: Mapping[str, Any]) -> dict[str, Any]:
    """A pair with the keys ``prompt``, ``chosen``, ``rejected``, and ``tools`` where it has some.

    All three are strings, or all three are lists of messages. A prompt that is not there is what both answers begin
    with; of two strings it is left out, for there a shared beginning need not be a prompt, and TRL decides. ShareGPT's
    form (``conversations``, and one turn as ``chosen`` and as ``rejected``) becomes messages. Where one of the three is
    a conversation, strings beside it become turns.

    Raises:
        DataError: an answer that is missing, of another type, empty, or the same as the other.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be a mapping of names to values, not {type(row).__name__}")
    if lacks := [key for key in ("chosen", "rejected") if row.get(key) is None]:
        raise DataError(f"a preference pair needs chosen and rejected: the row lacks {lacks}; its keys are {list(row)}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    plain = not any(row.get(key) for key in ("conversations", "system", "tools"))
    if plain and all(value is None or isinstance(value, str) for value in (prompt, chosen, rejected)):
        if chosen == rejected:
            raise DataError("chosen and rejected are the same, so nothing is preferred")
        if empty := [key for key in ("prompt", "chosen") if row.get(key) is not None and not row[key]]:
            raise DataError(f"{empty[0]} is an empty string")
        return ({} if prompt is None else {"prompt": prompt}) | {"chosen": chosen, "rejected": rejected}
    head = _head(row)
    good, bad = _turns(chosen, "chosen", head), _turns(rejected, "rejected", head)
    if not head:
        shared = 0
        while shared < min(len(good), len(bad)) and good[shared] == bad[shared]:
            shared += 1
        head, good, bad = good[:shared], good[shared:], bad[shared:]
        if not head:
            raise DataError("there is no prompt, and chosen and rejected do not begin with the same messages")
    if good == bad:
        raise DataError("chosen and rejected are the same, so nothing is preferred")
    for name, answer in (("chosen", good), ("rejected", bad)):
        if not answer or answer[0]["role"] != "assistant":
            told = f"starts with the role {answer[0]['role']!r}" if answer else "has nothing beyond the prompt"
            raise DataError(f"{name} {told}; after the prompt it must start with 'assistant'")
    tools = tools_of(row.get("tools"), wrapped=row.get("conversations") is not None)
    return {"prompt": head, "chosen": good, "rejected": bad} | ({"tools": tools} if tools else {})


def preference_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`to_preference` for every row: what ``datasets.Dataset.from_list`` makes a data set for TRL's ``DPOTrainer`` of.

    Raises:
        DataError: one error for all bad rows.
    """
    pairs: list[dict[str, Any]] = []
    faults: list[Fault] = []
    for index, row in enumerate(rows):
        try:
            pair = to_preference(row)
            pairs.append(Row(pair, row.file, row.line) if isinstance(row, Row) else pair)
        except DataError as error:
            faults.append(Fault(where(row, index), str(error)))
    raise_faults("the set of preference pairs", faults)
    if len({(type(pair["chosen"]), "prompt" in pair) for pair in pairs}) > 1:
        raise DataError("some preference pairs are strings and others messages, or some have no prompt: separate them")
    return pairs


def _head(row: Mapping[str, Any]) -> list[Message]:
    """The prompt as messages, a system prompt of its own column included."""
    system = string_of(row, "system", optional=True)
    turns: list[Any] = [{"role": "system", "content": system}] if system else []
    prompt = row.get("prompt")
    if prompt is None and row.get("conversations") is not None:
        return messages_of([*turns, *sharegpt_turns(row["conversations"], "conversations")], "conversations")
    if prompt is None:
        return []
    if isinstance(prompt, str):
        return messages_of([*turns, {"role": "user", "content": prompt}], "prompt")
    return messages_of([*turns, *prompt], "prompt") if isinstance(prompt, list) else messages_of(prompt, "prompt")


def _turns(value: Any, name: str, head: list[Message]) -> list[Message]:
    """An answer as messages without the prompt, which some sets repeat in it."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    elif isinstance(value, Mapping):
        value = [value]
    turns = messages_of(sharegpt_turns(value, name), name)
    return turns[len(head) :] if head and turns[: len(head)] == head else turns
