"""``SFTConfig``: transformers' TrainingArguments, with defaults for adapters and the few fields that data needs."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from transformers import TrainingArguments

from deltaw.data import RenderSettings
from deltaw.errors import ConfigError
from deltaw.optimizers import argument_faults, name_fault

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
        overlong: what becomes of an example longer than ``max_length``: ``error``, ``drop``, ``truncate_prompt`` (from
            the left), or ``truncate`` (its end, supervised text included).
        chat_template: a chat template in place of the tokenizer's: its text, or a name (``chatml``, ...).
        packing: several examples in one row, each seeing only itself.
        padding_free: a batch is one row without padding, each example seeing only itself.
        dataset_num_proc: processes that tokenize; None: as many as help.
        dataset_cache: keep the tokens for the next run with the same data, tokenizer, template and options.
        allow: findings of the check that shall not stop the run, by name.
        max_nonfinite_steps: stop after as many steps in a row whose loss or gradient is not finite.
        memory_limit: the most memory that the process may take on a CPU (``"24GiB"``).
        eval_answers: questions answered and scored at each evaluation.
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

    max_length: int | None = 1024
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    dataset_text_field: str = "text"
    last_turn_only_loss: bool = False
    dataset_format: str = "auto"
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

    def render_settings(self) -> RenderSettings:
        """The part of the config that decides how rows become tokens."""
        return RenderSettings(
            max_length=self.max_length,
            completion_only_loss=self.completion_only_loss,
            assistant_only_loss=self.assistant_only_loss,
            text_field=self.dataset_text_field,
            last_turn_only_loss=self.last_turn_only_loss,
            dataset_format=self.dataset_format,
            overlong=self.overlong,
            chat_template=self.chat_template,
        )
