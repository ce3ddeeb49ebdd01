"""Findings about the chat template and the tokenizer: whether chat will see what was trained on, token for token.

A few dozen rows are rendered again, the way generation does it, and held against the tokens of the data.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from deltaw.data.chat import apply_template
from deltaw.data.check_report import Finding
from deltaw.data.check_rows import example_of, spread
from deltaw.data.encode import encode
from deltaw.data.render import RenderSettings, render, render_prompt
from deltaw.data.tokens import TokenDataset
from deltaw.errors import DataError

__all__ = ["inserted_system_prompt", "template_findings", "token_findings"]

_LOOKED_AT = 64
_MARK = re.compile(r"<\|[\w ]+\|>|<(?:start|end)_of_turn>|\[/?INST\]")
_SAID = "Zq7"  # words that no template writes itself
_ASKED = "Vx9"
_SHOWN = 200  # characters of a system prompt


def template_findings(
    rows: Iterable[Mapping[str, Any]], dataset: TokenDataset, tokenizer: Any, settings: RenderSettings
) -> Iterator[Finding]:
    """Whether rows render to the tokens of the data, and those begin with what generation starts from."""
    whole = dataclasses.replace(settings, max_length=None)
    where = dataset.rows
    looked, stale, torn = 0, [], []
    silent = False  # a conversation without a system message of its own
    chats: list[Mapping[str, Any]] = []
    for number, row in spread(rows, _LOOKED_AT):
        try:
            example = example_of(row, settings, chat=bool(settings.chat_template or tokenizer.chat_template))
            full = render(row, tokenizer, whole)
            prompt = render_prompt(row, tokenizer, settings)
        except DataError:
            continue  # the renderer says so, for every row
        looked += 1
        if example.is_chat:
            turns = example.messages or example.prompt
            silent |= isinstance(turns, list) and turns[0]["role"] != "system"
            chats.append(row)
        answered = example.messages is None or example.messages[-1]["role"] == "assistant"
        if example.text is None and answered and full.input_ids[: len(prompt)] != prompt:
            torn.append(number)
        at = int(np.searchsorted(where, number)) if len(where) else 0
        single = at < len(where) and where[at] == number and (at + 1 == len(where) or where[at + 1] != number)
        if single and dataset.uncut[at] == dataset.lengths[at]:
            ids, mask = dataset.arrays(at)
            same = ids.tolist() == full.input_ids and np.flatnonzero(mask).tolist() == _learned(full.labels)
            if not same:
                stale.append(number)
    if torn:
        said = f"{len(torn)} of {looked} rows looked at do not begin with the tokens of their prompt"
        yield Finding.of("template-differs", said, rows=torn, count=len(torn))
    if stale:
        said = f"{len(stale)} of {looked} rows looked at render to other tokens than the data holds"
        yield Finding.of("stale-tokens", said, rows=stale, count=len(stale))
    if chats and (differing := _after_saving(chats, tokenizer, settings)):
        said = f"{differing} of {len(chats)} prompts render to other tokens with the tokenizer as it is saved"
        yield Finding.of("template-not-saved", said, count=differing)
    inserted = inserted_system_prompt(tokenizer, settings.chat_template) if silent else None
    if inserted:
        text = inserted if len(inserted) <= _SHOWN else inserted[:_SHOWN] + " ..."
        yield Finding.of("system-prompt-inserted", f"{text!r} stands before each conversation")


def token_findings(
    tokenizer: Any, settings: RenderSettings, *, vocab: int, model_config: Any = None
) -> Iterator[Finding]:
    """What holds for the tokenizer, its template and the model's config, whatever the rows are.

    Args:
        vocab: rows of the model's embedding.
        model_config: the model's transformers config, if it is known.
    """
    names = ("bos", "eos", "pad", "unk")
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    outside = [f"{name}={id_}" for name, id_ in ids.items() if id_ is not None and not 0 <= id_ < vocab]
    if outside:
        said = f"special tokens outside the vocabulary of {vocab:,} ({', '.join(outside)})"
        yield Finding.of("special-outside-vocabulary", said)
    if model_config is not None:
        yield from _mismatch(tokenizer, ids, vocab, model_config)
    if ids["pad"] is not None and ids["pad"] == ids["eos"]:
        yield Finding.of("pad-is-eos", f"pad = eos = {tokenizer.eos_token!r}")
    template = settings.chat_template or tokenizer.chat_template
    if template:
        try:
            turns = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
            text = apply_template(tokenizer, turns, chat_template=settings.chat_template)
        except DataError:
            return  # said where it is needed
        marks = sorted({mark for mark in _MARK.findall(text) if len(encode(tokenizer, mark)) > 1})
        if marks:
            yield Finding.of("markers-not-tokens", f"the chat template writes {', '.join(marks)}")


def inserted_system_prompt(tokenizer: Any, chat_template: str | None = None) -> str | None:
    """The system prompt that the template writes where a conversation has none; None if it writes none."""
    user = {"role": "user", "content": _ASKED}
    try:
        bare = apply_template(tokenizer, [user], chat_template=chat_template)
        given = apply_template(tokenizer, [{"role": "system", "content": _SAID}, user], chat_template=chat_template)
    except DataError:
        return None  # a template without a system role has none to insert
    if given.count(_SAID) != 1 or _ASKED not in bare or _ASKED not in given:
        return None
    head, _, rest = given.partition(_SAID)
    tail = rest.partition(_ASKED)[0]
    before = bare.partition(_ASKED)[0]
    if len(before) <= len(head) + len(tail) or not (before.startswith(head) and before.endswith(tail)):
        return None
    return before[len(head) : len(before) - len(tail)].strip() or None


def _mismatch(tokenizer: Any, ids: dict[str, int | None], vocab: int, model_config: Any) -> Iterator[Finding]:
    """Special tokens that the model's config knows under other ids; a tokenizer larger than the embedding."""
    said = []
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    for name in ("bos", "eos"):
        known = getattr(text, f"{name}_token_id", None)
        known = [] if known is None else known if isinstance(known, list) else [known]
        if known and ids[name] is not None and ids[name] not in known:
            said.append(f"{name} is {ids[name]} to the tokenizer and {', '.join(map(str, known))} to the model")
    if len(tokenizer) > vocab:
        said.append(f"the tokenizer has {len(tokenizer):,} tokens, the model {vocab:,}")
    if said:
        yield Finding.of("tokenizer-not-the-models", "; ".join(said))


def _after_saving(rows: list[Mapping[str, Any]], tokenizer: Any, settings: RenderSettings) -> int:
    """Prompts that come out otherwise once the tokenizer has been saved and read again, as chat does."""
    from transformers import AutoTokenizer

    plain = dataclasses.replace(settings, chat_template=None)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
    differing = 0
    for row in rows[:8]:
        before = render_prompt(row, tokenizer, settings)
        try:
            differing += render_prompt(row, again, plain) != before
        except DataError:
            differing += 1
    return differing


def _learned(labels: list[int]) -> list[int]:
    return [i for i, label in enumerate(labels) if label >= 0]
