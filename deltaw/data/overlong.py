"""Examples longer than max_length: a document in blocks, a prompt cut from the left, ids cut on the right.

Knows nothing of tokenizers or templates: whoever calls says how an example becomes ids. What is kept of a prompt:

- of a conversation: the system message and the tools whole, every token that the template writes, and the newest turns.
  The oldest turns before the answer go first; the first one that is left loses the beginning of its text. So what is
  left is a conversation again, from its BOS to its last token.
- of a prompt that is a string: its end, behind BOS.

A supervised answer is never cut: where it does not fit with one character of the prompt, that is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from deltaw.data.formats import Example
from deltaw.data.rendered import IGNORE, Rendered
from deltaw.errors import DataError

__all__ = ["blocks", "cut_right", "shorten_prompt"]

Tokens = tuple[list[int], list[int]]  # input_ids, labels


def cut_right(tokens: Tokens, limit: int | None) -> Rendered:
    """The first ``limit`` tokens; what is lost is counted."""
    ids, labels = tokens
    kept = len(ids) if limit is None else limit
    lost = len(labels[kept:]) - labels[kept:].count(IGNORE)
    return Rendered(ids[:kept], labels[:kept], len(ids), lost)


def blocks(tokens: Tokens, limit: int, bos: int | None) -> list[Rendered]:
    """A document in blocks of at most ``limit`` tokens, each of its tokens learned once.

    Every block begins with BOS, if the document does. Without BOS it begins with the last token of the block before it,
    unsupervised: something must precede the first token that is learned.
    """
    ids, labels = tokens
    has_bos = bos is not None and ids[:1] == [bos]
    made = [Rendered(ids[:limit], labels[:limit], min(limit, len(ids)))]
    for start in range(limit, len(ids), limit - 1):
        end = min(start + limit - 1, len(ids))
        lead = ids[0] if has_bos else ids[start - 1]
        made.append(Rendered([lead, *ids[start:end]], [IGNORE, *labels[start:end]], 1 + end - start))
    return made


def shorten_prompt(example: Example, answer: int, rendered: Callable[[Example], Tokens], limit: int) -> Tokens:
    """Ids and labels of the example with the longest end of its prompt that fits into ``limit`` tokens.

    Args:
        example: it does not fit as it is.
        answer: index of the first message that is learned, counted within ``example.prompt`` or ``example.messages``.
        rendered: makes ids and labels of an example.

    Raises:
        DataError: it does not fit with one character of a prompt either.
    """
    least = 0
    for shortened, length in _beginnings(example, answer):
        fits = rendered(shortened(1))
        least = len(fits[0])
        if least > limit:
            continue
        low, high = 1, length  # characters: `low` of them fit
        while low < high:
            middle = (low + high + 1) // 2
            tried = rendered(shortened(middle))
            if len(tried[0]) <= limit:
                low, fits = middle, tried
            else:
                high = middle - 1
        return fits
    raise DataError(
        f"its answer does not fit into max_length={limit}, "
        + (f"with the shortest prompt it has {least} tokens" if least else "and it has no prompt that could be cut")
        + ": raise max_length, or leave such rows out with overlong: drop"
    )


def _beginnings(example: Example, answer: int) -> Iterator[tuple[Callable[[int], Example], int]]:
    """Where the prompt may begin, the earliest first: a function of the characters kept there, and how many it has."""
    prompt = example.prompt
    if isinstance(prompt, str):
        if prompt:
            yield lambda kept: dataclasses.replace(example, prompt=prompt[-kept:]), len(prompt)
        return
    name = "messages" if prompt is None else "prompt"
    messages = (example.messages if prompt is None else prompt) or []
    head, answer = 0, min(answer, len(messages))
    while head < answer and messages[head]["role"] == "system":
        head += 1
    for i in range(head, answer):
        text = messages[i]["content"]
        if messages[i]["role"] != "user" or not text:
            continue

        def shortened(kept: int, i: int = i, text: str = text) -> Example:
            begun = {**messages[i], "content": text[-kept:]}
            return dataclasses.replace(example, **{name: [*messages[:head], begun, *messages[i + 1 :]]})

        yield shortened, len(text)
