"""``SFTConfig``: transformers' TrainingArguments, with defaults for adapters and the few fields that data needs."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import torch
from transformers import TrainingArguments

from deltaw.data import RenderSettings, with_labels
from deltaw.errors import ConfigError
from deltaw.optimizers import argument_faults, name_fault
from deltaw.train.memory import limit_bytes
from deltaw.train.runlog import require_trackers

__all__ = ["SFTConfig"]

log = logging.getLogger("deltaw")


@dataclasses.dataclass
class SFTConfig(TrainingArguments):
    """How a supervised fine-tuning run goes. Every field of ``TrainingArguments`` is here too.

    Args:
        max_length: longest example in tokens; a longer one is an error if the cut would lose supervised text.
        completion_only_loss: loss on the completion only; None: wherever a row has one.
        assistant_only_loss: loss on the assistant's turns only (it is so for ``messages`` in any case).
        dataset_text_field: the column of plain-text rows.
        last_turn_only_loss: loss on the last answer of a conversation only.
        dataset_format: of the rows; ``auto`` looks at their keys.
        dataset_label_names: of a classification, in the order of their numbers; None: the names that the rows give.
        overlong: what becomes of an example longer than ``max_length``: ``error``, ``drop``, ``truncate_prompt`` (from
            the left), or ``truncate`` (its end, supervised text included).
        chat_template: a chat template in place of the tokenizer's: its text, or a name (``chatml``, ...).
        packing: several examples in one row, each seeing only itself.
        padding_free: a batch is one row without padding, each example seeing only itself.
        dataset_num_proc: processes that tokenize; None: as many as help.
        dataset_cache: keep the tokens for the next run with the same data, tokenizer, template and options.
        allow: findings of the check that shall not stop the run, by name.
        max_nonfinite_steps: stop after as many steps in a row whose loss or gradient is not finite; each is skipped.
        memory_limit: the most memory that the run may take, on a CPU the process, on a GPU there (``"24GiB"``).
        eval_answers: questions answered and scored at each evaluation.
        early_stopping_patience: stop after as many evaluations without an improvement; the best adapter is kept.
        early_stopping_threshold: smaller improvements do not count.
        fast_loss: supervised-row loss and lean blocks; False runs the model's own forward.
        max_seq_length: older name of ``max_length``.
        model_init_kwargs: passed on when ``model`` is given by name.
        optim: transformers' names; ``adamw_8bit``, ``paged_adamw_32bit``, ``paged_adamw_8bit`` and ``sgd`` are made
            here, on any device and without bitsandbytes (docs/optimizers.md).
        optim_args: what the optimizer takes beyond the fields here, as ``"momentum=0.9"``.
    """

    learning_rate: float = 2e-4
    logging_steps: float = 10
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False
    include_num_input_tokens_seen: str | bool = "non_padding"
    logging_nan_inf_filter: bool = False

    max_length: int | None = 1024
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    dataset_text_field: str = "text"
    last_turn_only_loss: bool = False
    dataset_format: str = "auto"
    dataset_label_names: list[str] | None = None
    overlong: str = "error"
    chat_template: str | None = None
    packing: bool = False
    padding_free: bool = False
    dataset_num_proc: int | None = None
    dataset_cache: bool = False
    allow: list[str] = dataclasses.field(default_factory=list)
    max_nonfinite_steps: int = 3
    memory_limit: str | None = None
    eval_answers: int = 0
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    fast_loss: bool = True
    max_seq_length: int | None = None
    model_init_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.max_seq_length is not None:
            log.warning("max_seq_length is called max_length now; taking it as such")
            self.max_length, self.max_seq_length = self.max_seq_length, None
        faults = []
        if self.packing and self.padding_free:
            faults.append("packing and padding_free: packed rows have no padding already; keep one of the two")
        if self.max_length is not None and self.max_length < 2:
            faults.append(f"max_length={self.max_length}: an example needs at least two tokens")
        optim = str(getattr(self.optim, "value", self.optim))
        faults += [f"optim={optim!r}: {why}" for why in [name_fault(optim)] if why]
        faults += [f"optim_args={self.optim_args!r}: {why}" for why in argument_faults(optim, self.optim_args)]
        faults += self._watch_faults()
        if faults:
            raise ConfigError("SFTConfig:\n" + "\n".join(f"  - {fault}" for fault in faults))
        if hasattr(self, "activation_checkpointing") and self.activation_checkpointing is None:
            # transformers 5.2x renamed it and warns at the old name, which most users still write
            self.activation_checkpointing = self.gradient_checkpointing
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise transformers refuses bf16 on a machine that has nothing but a CPU
        if optim == "paged_adamw":
            self.optim = "paged_adamw_32bit"  # transformers has only the long name
        super().__post_init__()

    def _watch_faults(self) -> list[str]:
        """What is wrong with how the run is watched; and the defaults of how its best adapter is chosen."""
        faults = []
        for check in (lambda: require_trackers(self.report_to), lambda: limit_bytes(self.memory_limit)):
            try:
                check()
            except ConfigError as error:
                faults.append(str(error))
        if self.logging_nan_inf_filter:
            faults.append("logging_nan_inf_filter=True: it hides a loss that is not finite; leave it out")
        if self.max_nonfinite_steps < 1:
            faults.append(f"max_nonfinite_steps={self.max_nonfinite_steps}: 1 stops at the first")
        if self.early_stopping_patience is not None:
            when, save = (str(getattr(x, "value", x)) for x in (self.eval_strategy, self.save_strategy))
            if self.early_stopping_patience < 1:
                faults.append(f"early_stopping_patience={self.early_stopping_patience}: 1 stops at the first")
            if when == "no":
                faults.append("early_stopping_patience: nothing is evaluated; set eval_strategy")
            elif save not in (when, "best"):
                faults.append(
                    f"early_stopping_patience keeps the best adapter, but eval_strategy is {when!r} and save_strategy "
                    f"{save!r}: give both the same value, or save_strategy='best'"
                )
            self.load_best_model_at_end = True
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith("perplexity"):
            self.greater_is_better = False  # transformers takes all but a loss for better when greater
        return faults

    def for_rows(self, rows: Any) -> SFTConfig:
        """These arguments, with the labels of a classification as the training rows have them where none are given."""
        if self.dataset_label_names is not None:
            return self
        if not (names := with_labels(self.render_settings(), rows).label_names):
            return self
        changed = copy.copy(self)
        changed.dataset_label_names = list(names)
        return changed

    def render_settings(self) -> RenderSettings:
        """The part of the config that decides how rows become tokens."""
        return RenderSettings.of(self, chat_template=self.chat_template)
