"""The steps of the demo that touch a model: load, measure, train, save and read back, merge.

Each takes what it needs and returns what it found; none prints. Knows nothing of the terminal or the report.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback, TrainerCallback

from deltaw import (
    LoraConfig,
    NF4Config,
    PeftConfig,
    PeftModel,
    SFTConfig,
    SFTTrainer,
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
from deltaw.train.progress import ProgressCallback
from text_to_sql.memory import Peak
from text_to_sql.score import Outcome, execute, score

__all__ = [
    "Learned",
    "Merged",
    "load_base",
    "measure",
    "merge",
    "read_back",
    "size_on_disk",
    "tally",
    "telling",
    "train",
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


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """A training run.

    Attributes:
        model: the trained ``PeftModel``.
        log: ``step``, ``loss`` and ``learning_rate`` of every step.
        parameters: ``(trainable, all)``.
        seconds: what training took.
        tokens: how many were read.
        stopped: the step at which the time was up; None where all steps were made.
        peak: most bytes in memory at once.
    """

    model: Any
    log: list[dict[str, float]]
    parameters: tuple[int, int]
    seconds: float
    tokens: int
    stopped: int | None
    peak: int

    @property
    def trainable(self) -> str:
        """The line that PEFT users know."""
        some, everything = self.parameters
        share = 100 * some / everything
        return f"trainable params: {some:,d} || all params: {everything:,d} || trainable%: {share:.4f}"


class WithinTime(TrainerCallback):
    """Fits a run into ``seconds``, on however slow a machine: the linear schedule ends with the steps or with the
    time, whichever comes first, and no step is begun that would go past it.

    A run that is merely cut off keeps the high learning rate of its middle, and its last noisy steps with it. A
    run that fits has exactly the schedule of ``max_steps``, so that a seed gives the same model again.
    """

    SETTLED = 10  # steps until the pace counts: the first ones are slow

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.stopped: int | None = None
        self.begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        self.begun = time.perf_counter()
        steps, warmup = state.max_steps, args.get_warmup_steps(state.max_steps)

        def factor(step: int) -> float:
            return self.factor(step, steps, warmup, time.perf_counter() - self.begun)

        lr_scheduler.lr_lambdas = [factor] * len(lr_scheduler.lr_lambdas)

    def factor(self, step: int, steps: int, warmup: int, spent: float) -> float:
        """Of the learning rate: up through ``warmup``, then down to 0 at the last step that there is time for."""
        if step < warmup:
            return step / warmup
        if step >= self.SETTLED and spent > 0:
            steps = min(steps, max(step, int(step * self.seconds / spent)))
        return (steps - step) / max(1, steps - warmup)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spent = time.perf_counter() - self.begun
        if spent + spent / state.global_step > self.seconds and state.global_step < state.max_steps:
            self.stopped = state.global_step
            control.should_training_stop = True


class TenthLines(ProgressCallback):
    """Every step is logged, for the curve; where there is no bar, each tenth is enough to read."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        if self._bar is not None or step == 1 or step % 10 == 0 or step == state.max_steps:
            super().on_log(args, state, control, logs, **kwargs)


def train(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    recipe: Mapping[str, Any],
    *,
    base: str,
    seed: int,
    seconds: float | None,
    output: Path,
    stream: Any,
    quiet: bool,
    adapter: PeftConfig | None = None,
) -> Learned:
    """Puts an adapter on ``model`` and trains it.

    Args:
        recipe: fields of ``LoraConfig`` and of ``SFTConfig`` together.
        base: the name that the adapter gives to its base.
        seconds: training ends there, with the adapter as it is then; None makes all steps, however long they take.
        output: training itself writes nothing there but ``log.jsonl``.
        stream, quiet: of the progress bar.
        adapter: of any method, in place of the LoRA that the recipe describes.

    Raises:
        DeltawError: whatever the trainer finds wrong with the model, the recipe or the rows.
    """
    adapter_fields = {field.name for field in dataclasses.fields(LoraConfig)}
    lora = {key: value for key, value in recipe.items() if key in adapter_fields}
    settings = {key: value for key, value in recipe.items() if key not in adapter_fields}
    settings["warmup_steps"] = min(settings.get("warmup_steps", 0), settings["max_steps"] // 2)
    clock = None if seconds is None else WithinTime(seconds)
    progress = TenthLines(stream, quiet=quiet)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            seed=seed,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=list(rows),
        processing_class=tokenizer,
        peft_config=adapter or LoraConfig(**lora, task_type="CAUSAL_LM", base_model_name_or_path=base),
        callbacks=[progress] if clock is None else [progress, clock],
    )
    trainer.remove_callback(PrinterCallback)
    adapted: Any = trainer.model
    parameters = adapted.get_nb_trainable_parameters()
    began = time.perf_counter()
    try:
        with Peak(adapted) as memory:
            trainer.train()
    finally:
        progress.close()
    log = [
        {key: float(entry[key]) for key in ("step", "loss", "learning_rate")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return Learned(
        adapted,
        log,
        parameters,
        time.perf_counter() - began,
        int(trainer.state.num_input_tokens_seen),
        None if clock is None else clock.stopped,
        memory.bytes,
    )


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
