"""The stage that stops a run before it wastes hours: what is wrong with the examples, all of it at once.

Tokens are looked at as they are, so the faults of a renderer are found too; where the rows are given, their texts and
the chat template are looked at as well. Knows nothing of models but the size of their vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deltaw.data.check_counts import Training, count_lengths, steps_of, training_findings
from deltaw.data.check_facts import facts_of
from deltaw.data.check_masks import mask_findings, vocabulary_of
from deltaw.data.check_pairs import overlapping, pair_findings, repeated, split_findings
from deltaw.data.check_preview import preview
from deltaw.data.check_report import CheckReport, Finding
from deltaw.data.check_rows import row_findings
from deltaw.data.check_template import template_findings, token_findings
from deltaw.data.render import Rendered, RenderSettings
from deltaw.data.rows import Row
from deltaw.data.tokens import TokenDataset
from deltaw.errors import DataError

__all__ = ["CheckReport", "Finding", "Training", "check_features", "check_rendered", "check_tokens", "preview"]

Rows = Iterable[Mapping[str, Any]]


def check_tokens(
    dataset: TokenDataset,
    tokenizer: Any,
    settings: RenderSettings,
    *,
    eval_dataset: TokenDataset | None = None,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    training: Training | None = None,
    model_config: Any = None,
    vocab_size: int | None = None,
    used_columns: Sequence[str] = (),
) -> CheckReport:
    """Counts of the training examples, and what is wrong or worth knowing about training and evaluation examples.

    Args:
        dataset: the training examples.
        tokenizer: the one that rendered them.
        settings: the ones that they were rendered by.
        eval_dataset: the evaluation examples, if any.
        rows: what the training examples were rendered from, so that their texts and the template are checked too.
        eval_rows: the same of the evaluation examples.
        training: how a trainer will read them.
        model_config: a transformers config: its vocabulary and special tokens must be the tokenizer's.
        vocab_size: rows of the model's embedding; the config's when None, else the tokenizer's own size.
        used_columns: columns of the rows that something else reads.

    Raises:
        DataError: the chat template cannot render anything.
    """
    training = training or Training()
    vocab = vocab_size or _vocab_of(model_config) or len(tokenizer)
    vocabulary = vocabulary_of(tokenizer, settings)
    facts = facts_of(dataset, vocabulary)
    report = CheckReport(examples=len(dataset), tokens=dataset.tokens, supervised_tokens=int(facts.supervised.sum()))
    report.truncated = int((dataset.uncut > facts.lengths).sum())
    report.truncated_supervised = int((np.asarray(dataset.lost) > 0).sum())
    report.dropped = dataset.dropped
    report.duplicates = int(repeated(facts).sum())
    report.steps = steps_of(len(dataset), training)
    count_lengths(report, facts.lengths, training, settings.max_length)
    report.add(mask_findings(dataset, facts, vocabulary, tokenizer, settings, vocab=vocab, where="train"))
    report.add(pair_findings(dataset, facts, where="train"))
    report.add(token_findings(tokenizer, settings, vocab=vocab, model_config=model_config))
    report.add(training_findings(report, training))
    if rows is not None:
        report.add(row_findings(rows, settings, tokenizer, used_columns=used_columns, where="train"))
        report.add(template_findings(rows, dataset, tokenizer, settings))
    if eval_dataset is not None:
        seen = facts_of(eval_dataset, vocabulary)
        report.eval_examples, report.eval_tokens = len(eval_dataset), eval_dataset.tokens
        report.overlap = int(overlapping(seen, facts).sum())
        report.add(mask_findings(eval_dataset, seen, vocabulary, tokenizer, settings, vocab=vocab, where="eval"))
        report.add(split_findings(eval_dataset, seen, facts))
        if eval_rows is not None:
            report.add(row_findings(eval_rows, settings, tokenizer, used_columns=used_columns, where="eval"))
    given = {"train": rows, "eval": eval_rows}
    report.findings = [_placed(finding, given[finding.where]) for finding in report.findings]
    return report


def check_rendered(
    rendered: Sequence[Rendered],
    tokenizer: Any,
    settings: RenderSettings,
    *,
    eval_rendered: Sequence[Rendered] | None = None,
    batch_size: int = 8,
    vocab_size: int | None = None,
) -> CheckReport:
    """`check_tokens` for examples in a list.

    Args:
        rendered: the training examples.
        eval_rendered: the evaluation examples, if any.
        batch_size: for the estimate of padding.
    """
    return check_tokens(
        TokenDataset.of(rendered),
        tokenizer,
        settings,
        eval_dataset=None if eval_rendered is None else TokenDataset.of(eval_rendered),
        training=Training(batch_size=batch_size),
        vocab_size=vocab_size,
    )


def check_features(
    features: Sequence[Mapping[str, Any]], tokenizer: Any, settings: RenderSettings, **more: Any
) -> CheckReport:
    """`check_tokens` for rows that are tokens already.

    Args:
        features: each with ``input_ids``, and ``labels`` where not every token is learned.
        more: further arguments of `check_tokens`.

    Raises:
        DataError: ids and labels of different lengths.
    """
    made = []
    for i, row in enumerate(features):
        ids = [int(id_) for id_ in row["input_ids"]]
        labels = ids if row.get("labels") is None else [int(label) for label in row["labels"]]
        if len(ids) != len(labels):
            raise DataError(f"row {i} has {len(ids)} input_ids and {len(labels)} labels: give one label for each id")
        made.append(Rendered(ids, labels, len(ids)))
    return check_tokens(TokenDataset.of(made), tokenizer, settings, **more)


def _placed(finding: Finding, rows: Rows | None) -> Finding:
    """The finding with the files and lines of its rows, where they are known."""
    if not isinstance(rows, Sequence) or not finding.rows or finding.rows[-1] >= len(rows):
        return finding
    shown = [rows[number] for number in finding.rows]
    places = tuple(row.where for row in shown if isinstance(row, Row))
    return dataclasses.replace(finding, places=places) if len(places) == len(shown) else finding


def _vocab_of(model_config: Any) -> int | None:
    if model_config is None:
        return None
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return getattr(text, "vocab_size", None)
