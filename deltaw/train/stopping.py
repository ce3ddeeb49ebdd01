"""When a run should end: no better evaluation for a while, and a loss on held-out examples that rises.

Callbacks; they know the trainer's state and its logs only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

__all__ = ["EarlyStopping", "RisingLoss"]

_RISE = 0.01  # of the loss, which is more than the noise from one evaluation to the next

log = logging.getLogger("deltaw")


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count of evaluations without an improvement goes on after a resume."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        saved = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.early_stopping_patience_counter = int(
            saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        before = control.should_training_stop
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop and not before:
            log.warning(
                "step %d: no better %s in %d evaluation(s) than %.4g at step %s: early_stopping_patience ends the run",
                *(state.global_step, args.metric_for_best_model, self.early_stopping_patience_counter),
                *(state.best_metric if state.best_metric is not None else math.nan, state.best_global_step),
            )


class RisingLoss(TrainerCallback):
    """Warns, once a run, when after the first epoch the evaluation loss rises: examples are then learned by heart."""

    def __init__(self) -> None:
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._told = any(loss > _limit(best) for _, loss, _, best in _history(state.log_history))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self._told:
            return
        for key, loss, at, best in _history(state.log_history):
            if at == state.global_step and loss > _limit(best):
                self._told = True
                cure = (
                    "the best adapter is kept (load_best_model_at_end)"
                    if args.load_best_model_at_end
                    else "keep the best with load_best_model_at_end: true and early_stopping_patience: 2, or train "
                    "for fewer epochs (num_train_epochs)"
                )
                log.warning(
                    "step %d, epoch %.1f: %s rose to %.4f, it was %.4f at step %d: the examples are being learned by "
                    "heart; %s",
                    *(state.global_step, state.epoch, key, loss, best[1], best[0], cure),
                )
                return


def _limit(best: tuple[int, float]) -> float:
    return best[1] + _RISE * abs(best[1])


def _history(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, int, tuple[int, float]]]:
    """Each evaluation loss after the first epoch: key, loss, step, and (step, loss) of the lowest before it."""
    lowest: dict[str, tuple[int, float]] = {}
    for entry in entries:
        for key in (key for key in entry if key.startswith("eval_") and key.endswith("loss")):
            step, loss = int(entry["step"]), float(entry[key])
            if key in lowest and entry.get("epoch", 0) > 1:
                yield key, loss, step, lowest[key]
            if key not in lowest or loss < lowest[key][1]:
                lowest[key] = (step, loss)
