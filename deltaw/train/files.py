"""What a run writes and reads back: adapters, tokenizer, optimizer, and what the methods keep.

A part of the trainer; it knows checkpoints, and nothing of data or losses.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.trainer import OPTIMIZER_NAME

from deltaw import checkpoint
from deltaw.model import PeftModel
from deltaw.optim import mapped_loads
from deltaw.train.steering import prepare_resume, read_state, restore, save_state

__all__ = ["RunFiles"]


class RunFiles(Trainer):
    """Saves adapters in place of whole models, and loads them strictly."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        whole = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(whole, PeftModel):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        whole.save_pretrained(folder)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            save_state(self.model, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        reading: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if checkpoint is not None and getattr(getattr(self.optimizer, "optimizer", None), "paged", False):
            # paged states are copied to where they live; other optimizers keep the very tensors that were loaded
            reading = mapped_loads(Path(checkpoint, OPTIMIZER_NAME))
        with reading:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        whole = self.model if model is None else model
        if not isinstance(whole, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._load_adapters(whole, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel):
            self._load_adapters(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @staticmethod
    def _load_adapters(model: PeftModel, folder: str) -> None:
        """The weights of every adapter in a checkpoint, strictly, into the adapters that are in place."""
        states = read_state(folder)
        for name, config in model.peft_config.items():
            where = Path(folder) if name == "default" else Path(folder) / name
            tensors = checkpoint.read_tensors(where)
            prepare_resume(model, name, where)
            checkpoint.load_tensors(model.get_base_model(), name, config, tensors, str(where))
            restore(model, name, states)
