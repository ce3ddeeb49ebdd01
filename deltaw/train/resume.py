"""A run that goes on as if it had never stopped, and that stops where it can go on.

What transformers' checkpoints leave out is kept here: the loss since the last log line, which data it was, and what was
still to be done at the step. Knows nothing of models and losses.
"""

from __future__ import annotations

import json
import logging
import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from deltaw.atomic import write_text
from deltaw.errors import CheckpointError, ConfigError
from deltaw.train import checkpoints
from deltaw.train.files import RunFiles
from deltaw.train.signals import StopSignals

__all__ = ["RUNNING_NAME", "Resumable", "same_randomness"]

#: what a checkpoint holds beside transformers' files: the running loss, what is owed, which data it was
RUNNING_NAME = "running.json"
#: settings that decide which examples a step sees
_ORDER = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "packing",
    "padding_free",
    "max_length",
)

log = logging.getLogger("deltaw")


class _CutShort(Exception):
    """An evaluation that a signal ends."""


class Resumable(RunFiles):
    """Checkpoints that carry all of a run, and stops that end with one."""

    _signals: StopSignals
    _met = -1  # the step whose end was met last; meeting it again is meeting the epoch's end
    _saved = -1  # the step of the checkpoint written last
    _owed: tuple[str, ...] = ()  # events that a checkpoint is written before
    _epoch_owed = False  # the end of the epoch is one of them
    _from: Path | None = None  # the checkpoint that this run goes on from
    _before: dict[str, Any] | None = None  # what it says

    # --- training

    def train(
        self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As ``Trainer.train``, and resumed it gives bitwise what the uninterrupted run gives.

        Args:
            resume_from_checkpoint: a folder; True: the newest complete checkpoint in ``output_dir``; ``"auto"``: that,
                or a new run where there is none.

        Raises:
            CheckpointError, ConfigError: there is no such checkpoint, or it is of another run.
            Interrupted, Terminated: Ctrl-C or SIGTERM came; the step was finished and a checkpoint written.
        """
        run_dir = str(self.args.output_dir)
        found = checkpoints.resolve(resume_from_checkpoint, run_dir)
        self._owed, self._epoch_owed, self._met, self._saved = (), False, -1, -1
        self._from, self._before = found, None if found is None else self._read_running(found)
        if not any(isinstance(callback, _Watch) for callback in self.callback_handler.callbacks):
            self.add_callback(_Watch(self))
        with StopSignals() as self._signals:
            try:
                output = super().train(None if found is None else str(found), *args, **kwargs)
            except _CutShort:
                output = None
            if output is None or self._asked_to_stop():  # before the first step, or after the last
                raise self._signals.ending(checkpoints.newest(run_dir))
        if self._before is not None:
            output = output._replace(training_loss=output.metrics["train_loss"])
        return output

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args, **kwargs)
        best = self.state.best_global_step
        if self._before is not None and best and not os.path.isdir(self.state.best_model_checkpoint or ""):
            # the run's folder was moved
            moved = Path(self.args.output_dir or ".") / f"checkpoint-{best}"
            self.state.best_model_checkpoint = str(moved) if moved.is_dir() else None
        return epochs, batches

    def _take_up(self) -> None:
        """Puts the running loss back, once transformers has set it to zero."""
        self._met = self.state.global_step
        if self._before is None:
            return
        self._tr_loss += torch.tensor(self._before["loss"], dtype=self._tr_loss.dtype, device=self._tr_loss.device)
        self._total_loss_scalar = float(self._before["total_loss"])
        self._globalstep_last_logged = int(self._before["last_logged"])
        self._owed = tuple(self._before["owed"])

    def _run_epoch(self, **kwargs: Any) -> None:
        self._settle(kwargs["trial"], kwargs["start_time"], kwargs["ignore_keys_for_eval"])
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True  # the checkpoint is that of the last step
            return
        super()._run_epoch(**kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._settle(trial, start_time, None)
        if self.args.should_save:  # killed before it was thinned out, a run at its last step has one too many
            self._prune()
        return super()._finalize_training(trial, num_train_samples, start_time)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._before is not None and "train_loss" in logs:
            # transformers divides the loss of all steps by the steps since the checkpoint
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, *args, **kwargs)

    # --- the end of a step

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        rest = (tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)
        step = self.state.global_step
        # meeting a step a second time is meeting the end of its epoch
        self._epoch_owed = step != self._met and self.state.epoch >= epoch + 1
        self._met = step
        if not self._asked_to_stop():
            try:
                super()._maybe_log_save_evaluate(*rest)
            except _CutShort:
                log.info("the evaluation at step %d was cut short", step)
        if self._asked_to_stop():
            self._leave(rest)

    def _leave(self, rest: tuple[Any, ...]) -> None:
        """Logs what is due, saves, and leaves; an evaluation that is due is left to the run that goes on."""
        step = self.state.global_step
        if self.control.should_evaluate:
            self._owed = ("evaluate",)
            self.control.should_evaluate = False
        self.control.should_save = self._saved != step or bool(self._owed) or self.args.save_only_model
        super()._maybe_log_save_evaluate(*rest)
        self._owed = ()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)  # trackers close here
        self.is_in_train = False
        raise self._signals.ending(checkpoints.newest(str(self.args.output_dir)))

    def _settle(self, trial: Any, start_time: float, ignore_keys: Any) -> None:
        """What the checkpoint was written before: an evaluation, the end of an epoch."""
        owed, self._owed = self._owed, ()
        if not owed:
            return
        self._load_rng_state(None if self._from is None else str(self._from))  # which a checkpoint of the epoch keeps
        model: Any = self.model_wrapped
        rest = (self._tr_loss, None, model, trial, self.state.epoch, ignore_keys, start_time)
        if "evaluate" in owed:
            self.control.should_evaluate = True
            super()._maybe_log_save_evaluate(*rest)
        if "epoch_end" in owed:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            super()._maybe_log_save_evaluate(*rest)

    def _asked_to_stop(self) -> bool:
        """Whether a signal came, to any of the processes."""
        asked = self._signals.requested is not None
        if self.args.world_size > 1:
            flag = torch.tensor([int(asked)], device=self.args.device)
            asked = bool(self.accelerator.reduce(flag, reduction="sum").item())  # type: ignore[union-attr]
        return asked

    # --- what a checkpoint says

    def _saves_states(self) -> bool:
        return super()._saves_states() or self._asked_to_stop()  # who stops a run wants to go on

    def _save_progress(self, folder: Path) -> None:
        super()._save_progress(folder)
        running = {
            "owed": [*self._owed, *(["epoch_end"] if self._epoch_owed else [])],
            "loss": float(self._tr_loss),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "data": self._data_order(),
        }
        write_text(folder / RUNNING_NAME, json.dumps(running, indent=2) + "\n")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._saved = self.state.global_step

    def _read_running(self, folder: Path) -> dict[str, Any]:
        """
        Raises:
            CheckpointError: the file is not as it was written.
            ConfigError: the run sees other examples than the checkpoint's, so that it could not go on where that was.
        """
        try:
            running = json.loads((folder / RUNNING_NAME).read_text(encoding="utf-8"))
            then = running["data"]
            {key: running[key] for key in ("owed", "loss", "total_loss", "last_logged")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / RUNNING_NAME} cannot be read ({error!r}); take another checkpoint"
            ) from error
        now = self._data_order()
        differ = [key for key in now if key in then and then[key] != now[key]]
        if differ and not self.args.ignore_data_skip:
            told = "\n".join(f"  - {key}: {then[key]!r} in the checkpoint, {now[key]!r} now" for key in differ)
            raise ConfigError(
                f"cannot go on from {folder}: the examples that it has seen cannot be told from those to come\n{told}\n"
                "set them back; or begin the data anew with ignore_data_skip=True; or start a new run"
            )
        return running

    def _data_order(self) -> dict[str, Any]:
        """All that decides which examples a step sees, as JSON."""
        settings = {key: getattr(self.args, key, None) for key in _ORDER}
        values = {key: getattr(value, "value", value) for key, value in settings.items()}
        return values | {"examples": _fingerprint(self.train_dataset)}


class _Watch(TrainerCallback):
    """The trainer's own ear at events that it has no method for."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._take_up()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        alone = args.world_size == 1  # several processes would have to agree on where to stop
        if alone and self.trainer.is_in_train and self.trainer._signals.requested is not None:
            raise _CutShort


def _fingerprint(dataset: Any) -> str | int | None:
    """What tells data sets apart: a checksum of tokens where they are at hand, else how many examples there are."""
    inner = getattr(dataset, "dataset", dataset)  # what packed rows are made of
    arrays = [getattr(inner, name, None) for name in ("ids", "supervised", "offsets")]
    if all(isinstance(array, np.ndarray) for array in arrays):
        checksum = 0
        for array in arrays:
            checksum = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), checksum)  # type: ignore[arg-type]
        return f"{len(inner)} examples, {checksum:08x}"
    try:
        return len(dataset)
    except TypeError:
        return None  # a stream


@contextmanager
def same_randomness() -> Iterator[None]:
    """Whatever the block draws, afterwards Python's, NumPy's and PyTorch's generators are as before it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(_devices()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []
