"""The rows of a run: read, rendered with the tokenizer that will be saved, and checked.

Knows nothing of models or training.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deltaw.config import RunConfig
from deltaw.data import CheckReport, Rendered, RenderSettings, check_rendered, load_rows, render_all
from deltaw.loading import load_tokenizer

__all__ = ["RunData", "prepare_data"]

Tell = Callable[[str], object]


@dataclass(frozen=True)
class RunData:
    """The rows of a run, rendered and checked."""

    tokenizer: Any
    rows: list[dict[str, Any]]
    rendered: list[Rendered]
    eval_rendered: list[Rendered] | None
    report: CheckReport


def prepare_data(config: RunConfig, tell: Tell) -> RunData:
    """Rows read, rendered with the tokenizer that will be saved, and checked.

    Raises:
        DataError: what is wrong with the rows, all at once.
    """
    tokenizer = load_tokenizer(config.model_name_or_path, chat_template=config.chat_template_path)
    settings = RenderSettings(
        max_length=config.max_length,
        completion_only_loss=config.completion_only_loss,
        assistant_only_loss=config.assistant_only_loss,
        text_field=config.dataset_text_field,
        last_turn_only_loss=config.last_turn_only_loss,
        dataset_format=config.dataset_format,
        overlong=config.overlong,
    )
    rows, eval_rows = _read_rows(config)
    tell(f"read {len(rows):,} rows" + ("" if eval_rows is None else f", {len(eval_rows):,} to evaluate on"))
    rendered = render_all(rows, tokenizer, settings)
    eval_rendered = None if eval_rows is None else render_all(eval_rows, tokenizer, settings)
    report = check_rendered(
        rendered,
        tokenizer,
        settings,
        eval_rendered=eval_rendered,
        batch_size=config.per_device_train_batch_size,
    )
    report.raise_if_bad()
    tell(str(report))
    return RunData(tokenizer, rows, rendered, eval_rendered, report)


def _read_rows(config: RunConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    rows = load_rows(config.dataset_name, config.dataset_train_split, limit=config.max_train_samples, seed=config.seed)
    held_out = None
    if config.val_size:
        chosen = set(random.Random(config.seed).sample(range(len(rows)), max(1, round(config.val_size * len(rows)))))
        held_out = [row for i, row in enumerate(rows) if i in chosen][: config.max_eval_samples]
        rows = [row for i, row in enumerate(rows) if i not in chosen]
    elif config.evaluates:
        name = config.eval_dataset_name or config.dataset_name
        split = config.dataset_test_split
        held_out = load_rows(name, split, limit=config.max_eval_samples, seed=config.seed)
    return rows, held_out
