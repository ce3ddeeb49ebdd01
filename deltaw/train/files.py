"""What a run writes and reads back: adapters, tokenizer, optimizer, and what the methods keep.

A part of the trainer; it knows checkpoints, and nothing of data or losses. A checkpoint is whole or not there
(``checkpoints.py``), and so is the model that a run ends with (``deltaw/atomic.py``).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from deltaw import checkpoint
from deltaw.adapters import adapters_named
from deltaw.adapters.config import PeftConfig
from deltaw.atomic import publishing
from deltaw.errors import CheckpointError
from deltaw.model import PeftModel
from deltaw.optim import mapped_loads
from deltaw.train import checkpoints
from deltaw.train.steering import prepare_resume, read_state, restore, save_state

__all__ = ["RunFiles"]

#: fields of an adapter's config that may differ between a run and its checkpoint: they do not change what tensors mean
_FREE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}


class RunFiles(Trainer):
    """Saves adapters in place of whole models, and loads them strictly."""

    _writing: Path | None = None  # the folder of the checkpoint that is being written

    # --- a checkpoint

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', but in a folder that gets its name when all of it is on the disk."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir, step = Path(self._get_output_dir(trial=trial)), self.state.global_step
        resumable = self._saves_states()
        best = self.state.best_global_step
        if best and (best == step or (run_dir / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{best}")
        with checkpoints.writing(
            run_dir,
            step,
            writer=self.args.should_save,
            wait=self.accelerator.wait_for_everyone,
            resumable=resumable,
        ) as folder:
            self._writing = folder
            try:
                self.save_model(str(folder), _internal_call=True)
                if resumable:
                    self._save_optimizer_and_scheduler(str(folder))
                    self._save_scaler(str(folder))
                    self._save_rng_state(str(folder))
                if self.args.should_save:
                    self._save_progress(folder)
            finally:
                self._writing = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / f"checkpoint-{step}"))
        if self.args.should_save:
            self._prune(run_dir)

    def _prune(self, run_dir: Path | None = None) -> None:
        best = self.state.best_model_checkpoint
        folder = run_dir or Path(self.args.output_dir or ".")
        checkpoints.prune(folder, self.args.save_total_limit, [best] if best else [])

    def _saves_states(self) -> bool:
        """Whether checkpoints hold what a run needs to go on, and not the model alone."""
        return not self.args.save_only_model

    def _save_progress(self, folder: Path) -> None:
        """How far the run is, beyond weights and states."""
        exportable: list[Any] = [
            c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)
        ]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            save_state(self.model, output_dir)

    # --- the model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model (or its adapters) and the tokenizer; ``deltaw.atomic.publishing`` says what a kill leaves.

        Raises:
            CheckpointError: a file could not be written; what was there before is untouched.
        """
        folder = Path(output_dir or self.args.output_dir or ".")
        if self._writing == folder or not self.args.should_save:
            super().save_model(str(folder), _internal_call=True)
        else:
            with checkpoints.saving(folder), publishing(folder) as staged:
                super().save_model(str(staged), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

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

    # --- back again

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
            _same_adapter(model, name, where)


def _same_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Refuses a checkpoint whose tensors fit and would mean another update: an alpha that was changed since.

    Raises:
        CheckpointError: names each field, then and now.
    """
    saved, config = PeftConfig.from_pretrained(folder).to_dict(), model.peft_config[name]
    adapters = adapters_named(model.get_base_model(), name)
    for method in {type(adapter) for adapter in adapters.values() if not adapter.steers}:
        config = method.file_config(config, adapters)
    # what is not set yet is filled in when training starts
    now = {key: value for key, value in config.to_dict().items() if key not in _FREE and value is not None}
    differ = [key for key in now if key in saved and _plain(saved[key]) != _plain(now[key])]
    if differ:
        told = "\n".join(f"  - {key}: {saved[key]!r} in the checkpoint, {now[key]!r} now" for key in differ)
        raise CheckpointError(
            f"{folder} is of a run with another adapter config:\n{told}\nset them back, or start a new run"
        )


def _plain(value: Any) -> Any:
    """As JSON would give it back: lists and sets of names have no order."""
    return sorted(map(str, value)) if isinstance(value, list | set | tuple) else value
