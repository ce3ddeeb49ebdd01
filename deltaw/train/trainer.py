"""``SFTTrainer``: transformers' Trainer for supervised fine-tuning with adapters.

Rows are rendered and checked before the first weight moves; the loss is the fast one; only adapters are saved. It works
whether or not PEFT is installed: what transformers asks of PEFT's classes is answered here for ours.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from deltaw.adapters import PeftConfig
from deltaw.data.templates import use_template
from deltaw.errors import ConfigError, ModelError
from deltaw.loading import load_model, load_tokenizer
from deltaw.model import get_peft_model
from deltaw.modules import dtype_of
from deltaw.optim import optimizer_for, state_bytes
from deltaw.train.batches import Batches, collator_for, training_rows
from deltaw.train.config import SFTConfig
from deltaw.train.evaluation import TokenEvaluation
from deltaw.train.examples import token_sets
from deltaw.train.fast import compile_layers, fast_blocks
from deltaw.train.loss import causal_lm_loss, require_fast_loss
from deltaw.train.memory import MemoryGuard
from deltaw.train.nonfinite import FiniteSteps
from deltaw.train.parts import bare
from deltaw.train.resume import Resumable
from deltaw.train.runlog import RunLog
from deltaw.train.steering import SteeringCallback
from deltaw.train.stopping import EarlyStopping, RisingLoss

__all__ = ["SFTTrainer"]

log = logging.getLogger("deltaw")


class SFTTrainer(Resumable, TokenEvaluation, FiniteSteps, MemoryGuard, Batches):
    """Fine-tunes a causal language model on rows of text.

    Args:
        model: a model, a PeftModel, or a name or folder (loaded in the dtype of its checkpoint).
        args: an :class:`SFTConfig`; its ``output_dir`` is where checkpoints go.
        train_dataset: rows (prompt/completion, messages, alpaca, text) as a list or a Dataset; or rows that are tokens
            already (``input_ids`` and ``labels``).
        eval_dataset: the same.
        processing_class: the tokenizer; by default the model's own.
        peft_config: put a new adapter on the model; otherwise train what is trainable.
        kwargs: further arguments of ``transformers.Trainer`` (``callbacks``, ``optimizers``, ...).

    Raises:
        DataError: all that is wrong with the rows, before training.
        ConfigError, ModelError, TargetError: a run that cannot work.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        args = SFTConfig(output_dir="deltaw-output") if args is None else args
        if not isinstance(args, SFTConfig):
            raise ConfigError(f"args must be an SFTConfig, not {type(args).__name__}: deltaw.SFTConfig(output_dir=...)")
        name = model if isinstance(model, str) else getattr(model, "name_or_path", "")
        tokenizer = use_template(processing_class or load_tokenizer(name), args.chat_template)  # so it is saved with it
        # Rows first: they are cheap to check, and a fault here must not cost the time a model takes to load.
        train_features, eval_features, args = token_sets(train_dataset, eval_dataset, tokenizer, args)
        train_features = training_rows(train_features, args)
        whole: Any = model
        if isinstance(model, str):
            whole = load_model(model, **(args.model_init_kwargs or {}))
            log.info("loaded %s in %s, the dtype of its checkpoint", name, dtype_of(whole))
        if peft_config is not None:
            set_seed(args.seed)  # before A is drawn, so that one seed is one run
            whole = get_peft_model(whole, peft_config)
        if not any(p.requires_grad for p in whole.parameters()):
            raise ModelError(
                "nothing to train: every parameter is frozen; pass peft_config=LoraConfig(...), or load the adapter "
                "with is_trainable=True"
            )
        self.fast = args.fast_loss and self._can_be_fast(whole)
        self._compile = args.torch_compile
        super().__init__(
            model=whole,
            args=self._own_args(args, whole),
            data_collator=data_collator or collator_for(train_features, args, self._pad_id(tokenizer)),
            train_dataset=train_features,
            eval_dataset=eval_features,
            processing_class=tokenizer,
            **kwargs,
        )
        self._require_flat()
        for callback in (SteeringCallback(), RisingLoss(), RunLog()):
            self.add_callback(callback)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))
        # What transformers reads off the class of a model, it cannot see through a wrapper that is not PEFT's.
        self.label_names = ["labels"] if args.label_names is None else args.label_names
        self.can_return_loss = False
        if self.fast:
            self.model_accepts_loss_kwargs = True
            self._loss_shifts_labels = True

    # --- before training ----------------------------------------------------------------------------------------

    @staticmethod
    def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
        pad: Any = tokenizer.pad_token_id
        end: Any = tokenizer.eos_token_id
        return int(pad if pad is not None else end or 0)

    @staticmethod
    def _can_be_fast(model: nn.Module) -> bool:
        try:
            require_fast_loss(model)
        except ModelError as error:
            log.warning("the run uses the model's own loss: %s", error)
            return False
        return True

    def _own_args(self, args: SFTConfig, model: nn.Module) -> SFTConfig:
        """A copy of the arguments with what this trainer does itself taken out."""
        args = copy.copy(args)
        base = bare(model)
        half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype_of(base))  # type: ignore[arg-type]
        if half and args.mixed_precision == half:
            # the base computes in half precision by itself, over float32 adapters: autocast would only add casts
            log.info("%s=True: the base is in %s already, so autocast is left off", half, half)
            args.bf16 = args.fp16 = False
            args.mixed_precision = "no"
        args.torch_compile = False  # layers are compiled one by one when training starts
        # each process reads a stream itself: a batch that is one row cannot be dealt out by its first dimension
        accelerator: Any = args.accelerator_config
        args.accelerator_config = dataclasses.replace(accelerator, dispatch_batches=False)
        return args

    # --- training -----------------------------------------------------------------------------------------------

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        return optimizer_for(args, model) or Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        fresh = self.optimizer is None  # a second train() finds the first one's, wrapped by accelerate
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and isinstance(optimizer, torch.optim.Optimizer):
            optimizer.register_step_post_hook(_tell_changed)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; the metrics also tell the bytes of the optimizer's states."""
        output = super().train(*args, **kwargs)
        states = state_bytes(self.optimizer)
        log.info("optimizer states: %s", states)
        output.metrics["optimizer_state_bytes"] = states.total
        if states.paged:
            output.metrics["optimizer_paged_bytes"] = states.paged
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = bare(self.model)  # type: ignore[arg-type]
        if self._compile:
            log.info("compiling %d layers one by one", compile_layers(base))
        if not self.fast:
            return super()._inner_training_loop(*args, **kwargs)
        # over the whole loop, not only forward: activation checkpointing runs forward again during backward
        with fast_blocks(base, modules=not self._compile):
            return super()._inner_training_loop(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        whole = model if model is self.model else self.accelerator.unwrap_model(model, keep_torch_compile=False)
        # a wrapper (DDP, FSDP) must see forward itself to reduce gradients, so there the model's own loss is taken
        if not self.fast or return_outputs or whole is not model or self.compute_loss_func or self.label_smoother:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = causal_lm_loss(model, num_items_in_batch=num_items_in_batch, **inputs)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    # --- what transformers asks

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "attention_mask", "position_ids", "seq_lengths"]


def _tell_changed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Counts a step as a change of the parameters, for whoever remembers what they were worth: torch's fused kernels
    write them without a word to autograd."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    torch.autograd.graph.increment_version(params)
