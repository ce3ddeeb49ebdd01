"""The steps of the demo that touch a model, but for its training: load, measure, save and read back, merge.

Each takes what it needs and returns what it found; none prints. Knows nothing of the terminal or the report.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from deltaw import (
    NF4Config,
    PeftModel,
    load_model,
    load_tokenizer,
    merge_report,
)
from deltaw.adapters import host_layers
from deltaw.data import Collator, render_all
from deltaw.evaluate import Score, generate_batch
from deltaw.loading import resolve_model
from deltaw.merge import MergeReport
from deltaw.merge_quantized import quantized_merge_report
from deltaw.pipeline import Parity, verify_saved
from text_to_sql.score import Outcome, execute, score

__all__ = [
    "Merged",
    "load_base",
    "measure",
    "merge",
    "read_back",
    "size_on_disk",
    "tally",
    "telling",
]

Rows = Sequence[Mapping[str, Any]]
Progress = Callable[[int, int], object]

MAX_NEW_TOKENS = 32  # no gold query of the task has more; a model that rambles is cut there
BATCH = 100
PROBES = 8  # examples on which logits are compared


def load_base(name: str, load_in_4bit: bool = False) -> tuple[Any, Any]:
    """The base model, ready to answer, and its tokenizer; a built-in name is fetched when first used.

    Args:
        load_in_4bit: keep the weights of its layers in 4 bits (NF4, double quantized).

    Raises:
        ModelError, MissingExtra: as ``deltaw.load_model``.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return _base(name, load_in_4bit), load_tokenizer(name)


def _base(name: str, load_in_4bit: bool) -> Any:
    if not load_in_4bit:
        return _placed(load_model(name))
    return _placed(load_model(name, quantization_config=NF4Config(bnb_4bit_use_double_quant=True)))


@contextmanager
def telling(tell: Callable[[str], object]) -> Iterator[None]:
    """Hands on what deltaw logs meanwhile: that a model is downloaded and converted, for one."""

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(record.getMessage())

    logger, teller = logging.getLogger("deltaw"), Teller()
    level = logger.level
    logger.addHandler(teller)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(teller)
        logger.setLevel(level)


def measure(
    model: Any,
    tokenizer: Any,
    splits: Mapping[str, Rows],
    progress: Progress | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    run: Callable[[str], Any] = execute,
) -> dict[str, tuple[Outcome, ...]]:
    """Answers every question of every split, greedily, and runs the SQL: the outcomes by split.

    Args:
        max_new_tokens: where an answer is cut.
        run: executes SQL over the tables of the rows.
    """
    pooled = [row for rows in splits.values() for row in rows]  # all at once: full batches of like length
    answers = generate_batch(
        model,
        tokenizer,
        [row["prompt"] for row in pooled],
        max_new_tokens=max_new_tokens,
        batch_size=BATCH,
        progress=progress,
    )
    outcomes = iter(score(answers, pooled, run).outcomes)
    return {split: tuple(next(outcomes) for _ in rows) for split, rows in splits.items()}


def tally(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Score]:
    """How many are right in each split, with the interval."""
    return {
        split: Score(split, sum(one.status == "correct" for one in found), len(found))
        for split, found in outcomes.items()
    }


# --- files --------------------------------------------------------------------------------------------------


def read_back(
    model: Any, tokenizer: Any, rows: Rows, folder: Path, base: str, load_in_4bit: bool = False
) -> tuple[Any, Parity]:
    """Saves the adapter with its tokenizer, and reads it from disk onto a fresh base, strictly.

    Returns:
        The model that was read back, and how its logits compare with those of the trained one.

    Raises:
        CheckpointError: they differ, or the adapter changes nothing.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def fresh_base() -> Any:
        return _base(base, load_in_4bit)

    parity = verify_saved(model, folder, render_all(rows[:PROBES], tokenizer), fresh_base)
    return PeftModel.from_pretrained(fresh_base(), str(folder)).eval(), parity


def size_on_disk(name_or_folder: str | Path, model: Any = None) -> int:
    """Bytes of the safetensors files in a folder; those of ``model``'s parameters where there is no folder."""
    files = list(Path(resolve_model(str(name_or_folder))).glob("*.safetensors"))
    if files or model is None:
        return sum(file.stat().st_size for file in files)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# --- merging ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """The adapter folded into the base, against the two apart.

    Attributes:
        drift: of the logits.
        split: which questions were asked.
        apart, together: the scores of both.
        differing: ``(question, SQL apart, SQL merged, status apart, status merged)`` where the answers differ.
        other_way: what merging into the 4 bits themselves would have changed, in words; empty for a base in 16.
    """

    drift: MergeReport
    split: str
    apart: Score
    together: Score
    differing: list[tuple[str, str, str, str, str]]
    other_way: str = ""

    @property
    def holds(self) -> bool:
        """Within one point, or within one question where a question is more than a point."""
        return abs(self.apart.right - self.together.right) <= max(1, self.apart.total // 100)

    @property
    def verdict(self) -> str:
        """The difference in words."""
        points = 100 * (self.together.value - self.apart.value)
        if not points:
            return "no difference"
        if not self.holds:
            return f"{points:+.1f} points: merge in float32, or keep the adapter apart"
        return f"{points:+.1f} points" if abs(points) <= 1 + 1e-9 else "one question"


def merge(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    split: str,
    apart: Sequence[Outcome],
    progress: Progress | None = None,
) -> Merged:
    """Merges ``model`` for good, after measuring the drift, and asks it the same questions again. A base in 4 bits is
    merged into plain layers.

    Args:
        apart: the outcomes with the adapter beside its base.
    """
    device = next(model.parameters()).device
    probes = render_all(rows[:PROBES], tokenizer)
    batch = Collator(pad_token_id=0)([one.as_features() for one in probes])
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    four = any(host.store.quantized for _, host in host_layers(model))
    other_way = ""
    if four:
        both = quantized_merge_report(model, [inputs])
        drift, other_way = both.dequantized, f"merged into 4 bits again: {both.quantized}; {both.rounding}"
    else:
        drift = merge_report(model, [inputs])
    merged = model.merge_and_unload(safe_merge=True, dequantize=four)
    together = measure(merged, tokenizer, {split: rows}, progress)[split]
    differing = [
        (row["prompt"][-1]["content"], a.sql, b.sql, a.status, b.status)
        for row, a, b in zip(rows, apart, together, strict=True)
        if a.sql != b.sql
    ]
    scores = tally({"apart": apart, "together": together})
    return Merged(drift, split, scores["apart"], scores["together"], differing, other_way)


def _placed(model: Any) -> Any:
    """On the GPU where there is one, and ready to answer."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
