"""The rows of a run: read, split, rendered with the tokenizer that will be saved, and checked.

Knows nothing of models or training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import AutoConfig

from deltaw.config import RunConfig
from deltaw.data import (
    CheckReport,
    Rendered,
    RenderSettings,
    StreamedExamples,
    StreamedRows,
    TokenDataset,
    Training,
    check_tokens,
    count_formats,
    draw,
    load_rows,
    mix,
    split_rows,
    tokenize_rows,
    with_labels,
)
from deltaw.data.stored import joined, pick
from deltaw.errors import DataError
from deltaw.loading import load_tokenizer, resolve_model
from deltaw.provenance import rows_fingerprint

__all__ = ["RunData", "prepare_data", "read_data", "read_rows"]

Tell = Callable[[str], object]
Progress = Callable[[int, int | None], object]
Rows = Sequence[dict[str, Any]]

SECONDS = 10.0  # between two words on a progress that nobody draws
STREAM_CHECKED = 1000  # rows of a stream that are checked before training


@dataclass(frozen=True)
class RunData:
    """The rows of a run, rendered and checked.

    Attributes:
        tokenizer: the one that rendered them, and that will be saved.
        settings: how they were rendered; the names of a classification's labels filled in.
        rows: those trained on, or the stream of them.
        train_dataset: what a trainer takes.
        dataset: the examples that were checked: ``train_dataset`` itself, or the beginning of the stream.
        eval_dataset: the examples to evaluate on, if any.
        report: what the check found.
    """

    tokenizer: Any
    settings: RenderSettings
    rows: Rows | StreamedRows
    train_dataset: TokenDataset | StreamedExamples
    dataset: TokenDataset
    eval_dataset: TokenDataset | None
    report: CheckReport

    def shortest(self, count: int = 4) -> list[Rendered]:
        """The shortest examples: enough to see what a model does, at the least cost."""
        return [self.dataset.rendered(int(i)) for i in np.argsort(self.dataset.lengths, kind="stable")[:count]]

    def described(self, config: RunConfig) -> RunConfig:
        """The run with what its rows said filled in, so that whoever reads it again renders as it did."""
        names = self.settings.label_names
        return config if names is None else config.model_copy(update={"dataset_label_names": list(names)})

    def fingerprint(self) -> str:
        """Of the rows and their order; of the files they are read from, where they are a stream."""
        return self.rows.fingerprint() if isinstance(self.rows, StreamedRows) else rows_fingerprint(self.rows)


def prepare_data(config: RunConfig, tell: Tell, progress: Progress | None = None) -> RunData:
    """Rows read, rendered with the tokenizer that will be saved, and found good, or allowed.

    Raises:
        DataError: what is wrong with the rows, all at once.
    """
    data = read_data(config, tell, progress)
    data.report.raise_if_bad(config.allow)
    tell(str(data.report))
    return data


def read_data(config: RunConfig, tell: Tell, progress: Progress | None = None) -> RunData:
    """Rows read, rendered and checked; the report says what is wrong with them.

    Args:
        config: the run.
        tell: called with a sentence for each thing done.
        progress: called while rows are tokenized, with how many are done and of how many; unset: `tell` is.

    Raises:
        DataError: rows that cannot be read or rendered at all.
    """
    tokenizer = load_tokenizer(config.model_name_or_path, chat_template=config.chat_template_path)
    stream, rows, eval_rows = None, [], None
    if config.dataset_streaming:
        seed = config.seed if config.data_seed is None else config.data_seed
        stream = StreamedRows(config.dataset_name, config.dataset_train_split, seed=seed)
        rows, eval_rows = stream.head(STREAM_CHECKED), _eval_rows(config)
        tell(f"the first {len(rows):,} rows of the stream are checked now, the others when they are read")
    else:
        rows, eval_rows = read_rows(config, tell)
        tell(f"read {len(rows):,} rows" + ("" if eval_rows is None else f", {len(eval_rows):,} to evaluate on"))
    settings = _settings(config, rows, tell)
    progress = progress or _now_and_then(tell)

    def tokens(of: Rows) -> TokenDataset:
        workers = config.dataset_num_proc
        cache = config.dataset_cache and stream is None
        made = tokenize_rows(of, tokenizer, settings, workers=workers, cache=cache, progress=progress)
        if made.made:
            tell(f"tokens of {len(of):,} rows from the cache, made {made.made}")
        return made

    dataset = tokens(rows)
    eval_dataset = None if eval_rows is None else tokens(eval_rows)
    report = check_tokens(
        dataset,
        tokenizer,
        settings,
        eval_dataset=eval_dataset,
        rows=rows,
        eval_rows=eval_rows,
        training=_training(config),
        model_config=_model_config(config),
        used_columns=[name for name in [config.val_group_column] if name],
    )
    if stream is None:
        return RunData(tokenizer, settings, rows, dataset, dataset, eval_dataset, report)
    examples = StreamedExamples(stream, tokenizer, settings, allow=config.allow)
    return RunData(tokenizer, settings, stream, examples, dataset, eval_dataset, report)


def read_rows(config: RunConfig, tell: Tell) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to evaluate on if there are any.

    What is held out is held out first; then the rest is mixed by its weights and limited. So no row that is drawn
    twice can be on both sides.
    """
    names = [config.dataset_name] if isinstance(config.dataset_name, str) else config.dataset_name
    sources = [load_rows(name, config.dataset_train_split) for name in names]
    rows = joined(sources)
    kept: Sequence[int] = range(len(rows))
    held_out: Rows | None = None
    if config.val_size:
        split = split_rows(rows, config.val_size, seed=config.seed, group_column=config.val_group_column)
        tell(split.told)
        kept = split.train
        held_out = _limited(pick(rows, split.held_out), config.max_eval_samples, config.seed)
    else:
        held_out = _eval_rows(config)
    if config.dataset_weights is None:
        return _limited(pick(rows, kept), config.max_train_samples, config.seed), held_out
    ends = np.searchsorted(kept, np.cumsum([0, *map(len, sources)]))  # where each source's rows start among those kept
    mixed, drawn = mix(
        [pick(rows, kept[start:end]) for start, end in pairwise(ends)],
        config.dataset_weights,
        names=names,
        total=config.max_train_samples,
        seed=config.seed,
    )
    for one in drawn:
        tell(str(one))
    return mixed, held_out


def _eval_rows(config: RunConfig) -> Rows | None:
    """Evaluation rows that are a data set, or a split, of their own."""
    if not (config.eval_dataset_name or config.dataset_test_split):
        return None
    name = config.eval_dataset_name or config.dataset_name
    return load_rows(name, config.dataset_test_split, limit=config.max_eval_samples, seed=config.seed)


def _limited(rows: Rows, limit: int | None, seed: int) -> Rows:
    return rows if limit is None else draw(rows, limit, seed)


def _settings(config: RunConfig, rows: Rows, tell: Tell) -> RenderSettings:
    """How the rows are rendered; the labels of a classification are those that the rows have."""
    settings = RenderSettings.of(config)  # the template is the tokenizer's by now
    kind = config.dataset_format
    counts = count_formats(rows, config.dataset_text_field) if kind == "auto" else {kind: len(rows)}
    tell("format: " + ", ".join(f"{name} ({count:,} rows)" for name, count in counts.items()))
    if counts.get("classification"):
        if config.dataset_streaming and settings.label_names is None:
            raise DataError("a stream does not tell all its labels beforehand: give dataset_label_names: [name, ...]")
        settings = with_labels(settings, rows)
        tell(f"labels: {', '.join(settings.label_names or ())}")
    elif settings.label_names is not None:
        raise DataError(f"dataset_label_names = {list(settings.label_names)}, and no row has a text and a label")
    return settings


def _now_and_then(tell: Tell) -> Progress:
    """A progress that is told in words, for work that takes long."""
    told = time.monotonic()

    def progress(done: int, total: int | None) -> None:
        nonlocal told
        if time.monotonic() - told >= SECONDS:
            told = time.monotonic()
            tell(f"tokenized {done:,} rows" + ("" if total is None else f" of {total:,}"))

    return progress


def _training(config: RunConfig) -> Training:
    """How the trainer will read the examples."""
    return Training(
        batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=None if config.dataset_streaming else config.num_train_epochs,
        max_steps=config.max_steps,
        packing=config.packing,
        padding_free=config.padding_free,
        group_by_length=config.train_sampling_strategy == "group_by_length",
    )


def _model_config(config: RunConfig) -> Any:
    """The base's config, read without its weights; None where it cannot be: loading the model says why."""
    try:
        return AutoConfig.from_pretrained(
            resolve_model(config.model_name_or_path), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError):
        return None
