"""What a trainer is given -> tokens, checked. Knows nothing of models, batches or steps.

Rows are rendered and looked at before the model is loaded: a fault here must not cost the time which that takes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deltaw.data import (
    RenderSettings,
    StreamedExamples,
    TokenDataset,
    Training,
    as_rows,
    check_features,
    check_tokens,
    is_stream,
    tokenize_rows,
)
from deltaw.data.rows import class_names, from_columns
from deltaw.errors import DataError
from deltaw.train.batches import is_packed, streamed
from deltaw.train.config import SFTConfig

__all__ = ["token_sets"]

log = logging.getLogger("deltaw")
OVERLAP = "train-eval-overlap"  # of a caller's own two sets: told, and left to the caller
_LOOKED_AT = 1000  # examples of tokens made elsewhere
_LEVELS = {"error": logging.WARNING, "warning": logging.WARNING, "note": logging.INFO}


def token_sets(train: Any, evaluation: Any, tokenizer: Any, args: SFTConfig) -> tuple[Any, Any, SFTConfig]:
    """Token ids and labels of both sets, checked; those that are tokens already pass through. And the arguments, with
    the names of a classification's labels as the training rows have them.

    Args:
        train: rows (a list, a ``datasets.Dataset``, a stream), or tokens, or None.
        evaluation: the same, or a dictionary of several.
        tokenizer: a transformers tokenizer.
        args: an :class:`~deltaw.SFTConfig`.

    Raises:
        DataError: what is wrong with the rows, all of it at once, unless ``args.allow`` names it.
        ConfigError: a name in ``args.allow`` that is no finding.
    """
    rows = None if _are_tokens(train) else _rows(train)
    args = args if rows is None else args.for_rows(rows)
    settings = args.render_settings()
    named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
    held_out = {name: None if _are_tokens(part) else _rows(part) for name, part in named.items()}

    def tokens(given: Any, of: Any, training: bool) -> Any:
        if of is not None:
            return _tokens(of, tokenizer, args, settings)
        return streamed(given, tokenizer, args, training=training) if is_stream(given) else given

    trained = tokens(train, rows, True)
    evaluated = {name: tokens(part, held_out[name], False) for name, part in named.items()}
    _check(trained, rows, evaluated, held_out, tokenizer, args, settings)
    if rows is None and train is not None and not _are_ours(train) and not is_stream(train):
        _look_at(train, tokenizer, settings)
    return trained, evaluated if isinstance(evaluation, dict) else evaluated["eval"], args


def _tokens(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, args: SFTConfig, settings: RenderSettings
) -> TokenDataset:
    def made() -> TokenDataset:
        return tokenize_rows(rows, tokenizer, settings, workers=args.dataset_num_proc, cache=args.dataset_cache)

    if not args.dataset_cache:
        return made()
    with args.main_process_first(desc="tokenizing"):  # the other processes of this machine find it in the cache
        return made()


def _check(
    trained: Any,
    rows: Any,
    evaluated: Mapping[str, Any],
    held_out: Mapping[str, Any],
    tokenizer: Any,
    args: SFTConfig,
    settings: RenderSettings,
) -> None:
    """Of the sets that were made of rows here."""
    training = Training(
        batch_size=args.train_batch_size * args.world_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        packing=args.packing,
        padding_free=args.padding_free,
    )
    pairs = [(name, evaluated[name], of) for name, of in held_out.items() if of is not None]
    reports = []
    if rows is not None:
        name, part, of = pairs.pop(0) if len(pairs) == 1 else ("", None, None)
        reports.append(
            check_tokens(trained, tokenizer, settings, eval_dataset=part, rows=rows, eval_rows=of, training=training)
        )
    for name, part, of in pairs:
        report = check_tokens(part, tokenizer, settings, rows=of)
        log.info("%s: %d examples, %d tokens", name, report.examples, report.tokens)
        reports.append(report)
    for report in reports:
        for finding in report.findings:
            log.log(_LEVELS[finding.level], "%s: %s", finding.where, finding)
        report.raise_if_bad([*args.allow, OVERLAP])


def _look_at(features: Any, tokenizer: Any, settings: RenderSettings) -> None:
    """Tokens made elsewhere are the caller's own, so nothing stops them; but an end that is masked is told."""
    n = len(features)
    some = [features[i * n // min(n, _LOOKED_AT)] for i in range(min(n, _LOOKED_AT))]
    try:
        report = check_features(some, tokenizer, settings)
    except DataError as error:  # a template that renders nothing, which these tokens do not need
        log.info("the tokens were not checked: %s", error)
        return
    for problem in report.problems:
        log.warning("train_dataset, %d examples looked at: %s", len(some), problem)


# --- what was given -----------------------------------------------------------------------------------------


class _Read(Sequence[dict[str, Any]]):
    """A ``datasets.Dataset`` as rows, each read when it is asked for: as a list, they would all be in memory."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._row = from_columns(class_names(dataset.features))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._row(self._dataset[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._row, self._dataset)


def _rows(given: Any) -> Sequence[Mapping[str, Any]]:
    return _Read(given) if hasattr(given, "features") and hasattr(given, "column_names") else as_rows(given)


def _are_tokens(given: Any) -> bool:
    """Whether there is nothing to render: tokens, a stream (rendered while it is read), or nothing at all."""
    if isinstance(given, str | Mapping) or hasattr(given, "columns"):  # a name, splits, a data frame
        return False
    return given is None or _are_ours(given) or is_stream(given) or _have_ids(given)


def _are_ours(given: Any) -> bool:
    """Tokens that were made, and checked, by this library."""
    return isinstance(given, TokenDataset | StreamedExamples) or is_packed(given)


def _have_ids(given: Any) -> bool:
    return hasattr(given, "__len__") and len(given) > 0 and "input_ids" in given[0]
