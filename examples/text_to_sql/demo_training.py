"""The demo's training: the recipe within its time, and what the run was like. Prints nothing but its progress.

Knows nothing of questions, scores or the report.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from deltaw import LoraConfig, PeftConfig, SFTConfig, SFTTrainer
from deltaw.train.progress import ProgressCallback
from text_to_sql.memory import Peak

__all__ = ["Learned", "WithinTime", "train"]

Rows = Sequence[Mapping[str, Any]]


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
