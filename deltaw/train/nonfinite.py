"""Optimizer steps are taken only when the loss and the gradient are finite; others are skipped, counted and told.

A part of the trainer. A skipped step moves nothing: no parameter, no optimizer state, no schedule, no rank budget. Too
many in a row end the run with what was good saved. Knows nothing of how a loss is computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from deltaw.data.render import IGNORE
from deltaw.data.tokens import TokenDataset
from deltaw.errors import NonFiniteError
from deltaw.train import checkpoints

__all__ = ["COUNT", "FiniteSteps", "rows_of"]

#: the key of a log that says how many steps of the run were skipped
COUNT = "nonfinite_steps"
_SHOWN = 8  # rows that a message names
_TOLD = 5  # skipped steps that are told one by one; later ones each time their number has doubled
_USUAL = 2e-4  # learning rate of most adapters

log = logging.getLogger("deltaw")


class _Skipped(NamedTuple):
    """A step that was not taken."""

    loss: float  # of the whole step
    norm: float  # of the gradient
    finite: float  # the part of the loss that is in the running sum


class FiniteSteps(Trainer):
    """Skips a step whose loss or gradient is not finite, and ends a run of them.

    After ``max_nonfinite_steps`` in a row, :meth:`train` saves a checkpoint (the weights are those of the last good
    step) and raises :class:`~deltaw.errors.NonFiniteError`. The log says ``nan`` or ``inf`` where a loss was that, and
    counts in ``nonfinite_steps``; ``train_loss`` is the mean over the steps that were taken.
    """

    nonfinite_steps = 0
    _in_a_row = 0
    _skipped: _Skipped | None = None  # until it is logged
    _failed: str | None = None
    _losses: list[Tensor]
    _batches: list[Mapping[str, Any]]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``.

        Raises:
            NonFiniteError: too many steps in a row were not finite; the last good weights are saved.
        """
        self.nonfinite_steps = self._in_a_row = 0
        self._skipped = self._failed = None
        self._losses, self._batches = [], []
        output = super().train(*args, **kwargs)
        if self._failed is not None:
            raise NonFiniteError(self._failed + self._saved_where())
        return output

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        start = super()._init_training_state(*args, **kwargs)
        self.nonfinite_steps = max((int(entry.get(COUNT, 0)) for entry in self.state.log_history), default=0)
        return start

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._batches.append(dict(inputs))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._losses.append(loss)
        # one nan would stay in transformers' running sum for good: the log gets its nan from us, and then goes on
        return loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        batches, losses = self._batches, self._losses
        self._batches, self._losses = [], []
        if norm is None or not losses or self.is_deepspeed_enabled:  # which guards its steps itself
            return norm
        self._skipped = self._look(norm, losses)
        if self.accelerator.scaler is None:
            self.optimizer._is_overflow = self._skipped is not None  # type: ignore[union-attr]
        if self._skipped is None:
            self._in_a_row = 0
            return norm
        if self.accelerator.scaler is None:  # it would skip the step by itself
            # accelerate's optimizer steps only where gradients are synchronized; the next batch sets this again
            self.accelerator.gradient_state._set_sync_gradients(False)
        self.nonfinite_steps += 1
        self._in_a_row += 1
        self._tell(losses, batches)
        return norm

    def _look(self, norm: Any, losses: Sequence[Tensor]) -> _Skipped | None:
        """Loss and gradient norm of a step if it must not be taken, in one transfer from the device."""
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
        loss = losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()
        facts = torch.stack([norm.detach().to(loss.device, torch.float32), loss.float()])
        if self.args.world_size > 1:  # each has a loss of its own, and all must step or none
            facts = self.accelerator.reduce(facts, reduction="mean")
        norm_value, value = facts.tolist()  # type: ignore[union-attr]
        if math.isfinite(value) and math.isfinite(norm_value):
            return None
        scaler = self.accelerator.scaler
        if scaler is not None and math.isfinite(value) and scaler.get_scale() >= 1:
            return None  # float16 looks for its loss scale in this way
        return _Skipped(value, norm_value, float(sum(x.nan_to_num(0.0, 0.0, 0.0) for x in losses)))

    # --- what is said and saved

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._skipped is not None:
            self.control.should_log = True  # at once, so that a checkpoint knows of it too
        if self._failed is not None:
            self.control.should_training_stop = True
            self.control.should_evaluate = False
            self.control.should_save = self._ruined() is None
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._skipped is not None:
            self._skipped = None
            self.accelerator.gradient_state._set_sync_gradients(True)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.nonfinite_steps and ("loss" in logs or "train_loss" in logs):
            logs[COUNT] = self.nonfinite_steps
        if "loss" in logs and self._skipped is not None:
            self._total_loss_scalar -= self._skipped.finite  # it was not trained on
            if not math.isfinite(self._skipped.loss):
                logs["loss"] = self._skipped.loss
        if self.nonfinite_steps and "train_loss" in logs:
            steps = self.state.global_step
            taken = steps - self.nonfinite_steps
            logs["train_loss"] = logs["train_loss"] * steps / taken if taken > 0 else math.nan
        super().log(logs, *args, **kwargs)

    def _tell(self, losses: Sequence[Tensor], batches: Sequence[Mapping[str, Any]]) -> None:
        """A warning, or the reasons why the run ends here."""
        assert self._skipped is not None
        step, most = self.state.global_step + 1, max(1, int(getattr(self.args, "max_nonfinite_steps", 3)))
        what = _what(self._skipped)
        ruined = self._ruined() if self._in_a_row == 1 or self._in_a_row >= most else None
        n = self.nonfinite_steps
        if ruined is None and self._in_a_row < most:
            if n <= _TOLD or n.bit_count() == 1:
                log.warning("step %d: %s: the step is skipped (%d in a row, %d in all)", step, what, self._in_a_row, n)
            return
        bad = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(float(loss))]
        causes = [f"  - {cause}" for cause in self._causes(bad or batches, ruined)]
        told = f"{self._in_a_row} steps in a row were skipped" if ruined is None else "nothing can be learned any more"
        self._failed = "\n".join([f"step {step}: {what}: {told}. Likely causes, and cures:", *causes])

    def _causes(self, batches: Sequence[Mapping[str, Any]], ruined: str | None) -> Iterator[str]:
        args, model = self.args, cast(nn.Module, self.model)
        if ruined is not None:
            yield f"{ruined} is not finite itself: " + (
                "a step before this one was too large; go on from an older checkpoint with a lower learning_rate"
                if dict(model.named_parameters())[ruined].requires_grad
                else "the base model's files are damaged, or its dtype cannot hold its weights"
            )
        labels = [batch["labels"] for batch in batches if "labels" in batch]
        if labels and not any(bool((one != IGNORE).any()) for one in labels):
            yield "no token of the batch is supervised, so that its loss is 0 / 0: run deltaw check on the data"
        rate, norm = float(args.learning_rate), float(args.max_grad_norm or 0)
        high = f", {rate / _USUAL:.0f} times what adapters usually take" if rate > 5 * _USUAL else ""
        yield f"learning_rate = {rate:g}{high}: try {min(rate / 4, _USUAL):g}, or more warmup_steps"
        if not norm:
            yield "max_grad_norm = 0 lets gradients of any length through: 1.0"
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if torch.float16 in dtypes or args.fp16:
            yield "float16 ends at 65,504: use dtype: bfloat16 (or bf16: true) where the device has it, or float32"
        elif torch.bfloat16 in dtypes or args.bf16:
            yield "bfloat16 has 8 bits of precision: see whether dtype: float32 trains"
        rows = rows_of(batches, self.train_dataset)
        if rows:
            more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
            yield f"the data of this step: rows {', '.join(map(str, rows[:_SHOWN]))}{more} of train_dataset, from 0"

    def _saved_where(self) -> str:
        newest = checkpoints.newest(str(self.args.output_dir))
        if newest is None:
            return "\nno checkpoint is left of this run"
        current = newest.name == f"checkpoint-{self.state.global_step}"
        what = "the last good weights are in" if current else "the newest checkpoint is"
        return f"\n{what} {newest}: go on with resume_from_checkpoint: {newest}"

    @torch.no_grad()
    def _ruined(self) -> str | None:
        """The first parameter that is not finite; those that are trained come first."""
        model: Any = self.model
        for name, param in sorted(model.named_parameters(), key=lambda named: not named[1].requires_grad):
            if param.is_floating_point() and not bool(torch.isfinite(param).all()):
                return name
        return None


def _what(skipped: _Skipped) -> str:
    if not math.isfinite(skipped.loss):
        return f"the loss is {skipped.loss}"
    return f"the norm of the gradient is {skipped.norm} (the loss {skipped.loss:.4g})"


def rows_of(batches: Sequence[Mapping[str, Any]], dataset: Any) -> list[int]:
    """The rows of ``dataset`` that ``batches`` were made of, found by their tokens; empty where that cannot be told.

    Args:
        batches: each with ``input_ids`` (b, t), and ``attention_mask`` (b, t) or ``position_ids`` (b, t) that start
            again at each example.
        dataset: a :class:`~deltaw.data.TokenDataset`, packed rows of one, or a list of rows with ``input_ids``.
    """
    tokens = getattr(dataset, "dataset", dataset)
    if isinstance(tokens, TokenDataset):
        lengths, rows = np.diff(tokens.offsets), tokens.rows
    elif isinstance(tokens, list):
        lengths, rows = np.array([len(row["input_ids"]) for row in tokens]), range(len(tokens))
    else:
        return []
    found = set()
    for example in (example for batch in batches for example in _examples(batch)):
        for i in np.flatnonzero(lengths == len(example)):
            if np.array_equal(tokens[int(i)]["input_ids"], example):
                found.add(int(rows[i]))
                break
    return sorted(found)


def _examples(batch: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The token ids of each example in a batch."""
    ids = batch["input_ids"].cpu().numpy()
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    for row, line in enumerate(ids):
        if positions is not None:
            starts = np.flatnonzero(positions[row].cpu().numpy() == 0)
            yield from np.split(line, starts[1:])
        elif mask is not None and mask.dim() == 2:
            yield line[mask[row].cpu().numpy().astype(bool)]
        else:
            yield line
