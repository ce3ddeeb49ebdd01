"""Findings about what the loss covers and which tokens there are: of one data set, from its ids and labels alone.

So they also find the faults of whoever made the tokens. Knows nothing of texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from deltaw.data.check_facts import Facts, Vocabulary
from deltaw.data.check_report import Finding
from deltaw.data.render import RenderSettings, stop_token_ids
from deltaw.data.tokens import TokenDataset
from deltaw.findings import Level

__all__ = ["mask_findings", "some", "vocabulary_of"]

_KEPT_ROWS = 20  # of a finding, to be looked up
_SPIKE = 0.2  # share of the examples that have exactly the greatest length
_FEW = 20  # examples below which shares say nothing
_LONG = 64  # tokens below which many examples have one length by nature
_WHITE = "\u0120\u2581\u010a\u0109 \n\t\r"  # white space, and how byte-level and sentencepiece vocabularies write it


def vocabulary_of(tokenizer: Any, settings: RenderSettings) -> Vocabulary:
    """What the tokenizer's ids are.

    Raises:
        DataError: the chat template renders no conversation at all.
    """
    stops = stop_token_ids(tokenizer, settings.chat_template)
    special = {*tokenizer.all_special_ids, *stops}
    special |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    white = {id_ for token, id_ in tokenizer.get_vocab().items() if not token.strip(_WHITE)}
    return Vocabulary(stops, special, special | white, tokenizer.bos_token_id)


def some(
    name: str,
    bad: np.ndarray,
    dataset: TokenDataset,
    said: str,
    *,
    where: str,
    level: Level | None = None,
    cure: str | None = None,
) -> Iterator[Finding]:
    """The finding, if any example shows it.

    Args:
        bad: (n,) bool.
        said: a verb and what follows, after "3 of 10 examples".
    """
    index = np.flatnonzero(bad)
    if len(index):
        said = f"{len(index):,} of {len(dataset):,} examples {said}"
        rows = np.unique(dataset.rows[index[: 4 * _KEPT_ROWS]])[:_KEPT_ROWS]
        yield Finding.of(name, said, rows=rows, count=len(index), where=where, level=level, cure=cure)


def mask_findings(
    dataset: TokenDataset,
    facts: Facts,
    vocabulary: Vocabulary,
    tokenizer: Any,
    settings: RenderSettings,
    *,
    vocab: int,
    where: str,
) -> Iterator[Finding]:
    """Findings of one data set.

    Args:
        vocab: rows of the model's embedding.
        where: ``train`` or ``eval``.
    """
    if not len(dataset):
        yield Finding.of("no-examples", "there are no examples", where=where)
        return

    def found(name: str, bad: np.ndarray, said: str, **changes: Any) -> Iterator[Finding]:
        return some(name, bad, dataset, said, where=where, **changes)

    nothing, lost = facts.supervised == 0, np.asarray(dataset.lost) > 0
    cut = dataset.uncut > facts.lengths
    limit = f"max_length={settings.max_length}"
    yield from found("no-supervised-token", nothing & ~lost, "have no supervised token")
    yield from found("answer-cut-away", nothing & lost, f"lose every supervised token to {limit}")
    yield from found(
        "truncated-answer",
        ~nothing & lost,
        f"lose part of the supervised text, its stop token included, to {limit}",
        level="warning" if settings.overlong == "truncate" else None,
        cure="raise max_length, or shorten them" if settings.overlong == "truncate" else None,
    )
    if settings.overlong == "error":
        longest = int(np.max(dataset.uncut))
        yield from found("too-long", cut & ~lost, f"are longer than {limit} (the longest has {longest:,} tokens)")
    else:
        yield from found("truncated-prompt", cut & ~lost, f"have a prompt that does not fit into {limit}")
    if dataset.dropped:
        said = f"{dataset.dropped:,} of {dataset.dropped + len(np.unique(dataset.rows)):,} rows are longer than {limit}"
        yield Finding.of("dropped-rows", said, count=dataset.dropped, where=where)

    yield from found(
        "stop-token-not-supervised", facts.open_runs > 0, "do not supervise a stop token at the end of an answer"
    )
    stops = [tokenizer.convert_ids_to_tokens(id_) for id_ in vocabulary.stops]
    yield from found("other-stop-token", facts.odd_runs > 0, f"end an answer with another token than {stops}")
    yield from found(
        "empty-answer", (facts.empty_runs > 0) & ~lost, "have an empty answer (nothing but the token that ends it)"
    )
    yield from _beginnings(dataset, facts, vocabulary, tokenizer, where)
    whole = (facts.prompt_length <= 1) & (facts.supervised > 0)
    if settings.completion_only_loss is False and not settings.assistant_only_loss:
        yield from found(
            "prompt-supervised", whole, "are learned as a whole, as completion_only_loss=False says", level="note"
        )

    outside = (facts.lowest < 0) | (facts.highest >= vocab)
    said = f"hold token ids outside the vocabulary of {vocab:,} (up to {int(facts.highest.max()):,})"
    yield from found("outside-vocabulary", outside & (facts.lengths > 0), said)
    yield from _spike(dataset, facts, cut, where)


def _beginnings(
    dataset: TokenDataset, facts: Facts, vocabulary: Vocabulary, tokenizer: Any, where: str
) -> Iterator[Finding]:
    """One BOS where the tokenizer begins plain text with one."""
    bos = vocabulary.bos
    if bos is None:
        return
    yield from some("double-bos", facts.bos > 1, dataset, "begin with two BOS tokens", where=where)
    if tokenizer("a", verbose=False)["input_ids"][:1] != [bos]:
        return
    first = np.ones(len(dataset), bool)  # the later blocks of a document begin anywhere, and so does a cut prompt
    first[1:] = dataset.rows[1:] != dataset.rows[:-1]
    missing = first & (facts.bos == 0) & (facts.lengths > 0) & (dataset.uncut <= facts.lengths)
    mixed = bool((facts.bos[first] > 0).any())
    yield from some(
        "missing-bos",
        missing,
        dataset,
        "do not begin with the BOS token" + (", and others do" if mixed else ""),
        where=where,
        level="error" if mixed else None,
    )


def _spike(dataset: TokenDataset, facts: Facts, cut: np.ndarray, where: str) -> Iterator[Finding]:
    """Uncut examples that all have the greatest length: whoever made them cut them, and did not say so."""
    single = np.ones(len(dataset), bool)  # a long document is cut into blocks of one length on purpose
    same = dataset.rows[1:] == dataset.rows[:-1]
    single[1:] &= ~same
    single[:-1] &= ~same
    whole = single & ~cut
    if whole.sum() < _FEW:
        return
    longest = int(facts.lengths[whole].max())
    at = whole & (facts.lengths == longest)
    if longest >= _LONG and at.sum() >= _SPIKE * whole.sum():
        yield from some("cut-upstream", at, dataset, f"have exactly {longest} tokens, and none has more", where=where)
