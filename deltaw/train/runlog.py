"""``log.jsonl``: every log of a run as one JSON object a line, and the trackers that it is reported to.

Knows nothing of models and data.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils as trackers

from deltaw.atomic import write_text
from deltaw.errors import ConfigError, did_you_mean

__all__ = ["LOG_NAME", "RunLog", "read_log", "require_trackers"]

LOG_NAME = "log.jsonl"

#: name in ``report_to`` -> whether its package is here, and how to get it; the calls behind them are transformers' own
_TRACKERS: dict[str, tuple[Callable[[], bool], str]] = {
    "tensorboard": (trackers.is_tensorboard_available, "tensorboard"),
    "trackio": (trackers.is_trackio_available, "trackio"),
    "wandb": (trackers.is_wandb_available, "wandb"),
    "mlflow": (trackers.is_mlflow_available, "mlflow"),
    "comet_ml": (trackers.is_comet_available, "comet-ml"),
    "clearml": (trackers.is_clearml_available, "clearml"),
    "codecarbon": (trackers.is_codecarbon_available, "codecarbon"),
    "dagshub": (trackers.is_dagshub_available, "dagshub mlflow"),
    "dvclive": (trackers.is_dvclive_available, "dvclive"),
    "swanlab": (trackers.is_swanlab_available, "swanlab"),
}
_WORDS = ("none", "all")
_WORDED = ("nan", "inf", "-inf")  # numbers that JSON has no notation for

log = logging.getLogger("deltaw")


def require_trackers(report_to: str | Iterable[str] | None) -> list[str]:
    """The trackers in ``report_to``, each of which is installed; called before anything is loaded.

    Raises:
        ConfigError: names that no tracker has, and packages that are not installed, with what installs them.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name for name in names if name not in _WORDS]
    known = {*_TRACKERS, *trackers.INTEGRATION_TO_CALLBACK}
    faults = []
    for name in names:
        if name not in known:
            near = did_you_mean(name, known) or f"; there are {', '.join([*_WORDS, *sorted(known)])}"
            faults.append(f"report_to: {name!r} is no tracker{near}")
        elif name in _TRACKERS and not _TRACKERS[name][0]():
            faults.append(f"report_to: {name!r} needs a package that is not here: pip install {_TRACKERS[name][1]}")
    if faults:
        raise ConfigError("\n".join([*faults, f"(without any, report_to: none, {LOG_NAME} holds every log)"]))
    return names


class RunLog(TrainerCallback):
    """Appends each log to ``log.jsonl`` in the output folder and hands it to the system at once.

    A line has ``step``, ``time`` (seconds since 1970) and what was logged; a number that is not finite is written as
    ``"nan"``, ``"inf"`` or ``"-inf"``, since JSON has none. A run that goes on drops the lines beyond the step of its
    checkpoint, so that each is there once; a new run begins a new log. A line that cannot be written does not end the
    run.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._writes = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._writes = bool(state.is_world_process_zero)
        self._path = Path(args.output_dir) / LOG_NAME
        if not self._writes:
            return
        kept = [entry for entry in read_log(self._path) if entry["step"] <= state.global_step]
        kept = kept if state.global_step else []
        try:
            write_text(self._path, "".join(_line(entry) for entry in kept))
        except OSError as error:
            self._give_up(error)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._append({"step": state.global_step, "time": round(time.time(), 3), **(logs or {})})

    def on_answers(self, state: Any, answers: Iterable[Any]) -> None:
        """What the model said at an evaluation."""
        told = [{**one._asdict(), "right": one.right} for one in answers]
        self._append({"step": state.global_step, "time": round(time.time(), 3), "answers": told})

    def _append(self, entry: Mapping[str, Any]) -> None:
        if not self._writes or self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(entry))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writes = False
        log.warning("%s cannot be written (%s): the run goes on without it", self._path, error.strerror or error)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a ``log.jsonl``, numbers that are not finite included; a line that was cut short is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
            entry["step"] = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a kill or a full disk cut it
        entries.append(
            {key: float(value) if value in ("nan", "inf", "-inf") else value for key, value in entry.items()}
        )
    return entries


def _line(entry: Mapping[str, Any]) -> str:
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in entry.items()}
    said = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
    return json.dumps(said, ensure_ascii=False, allow_nan=False, default=str) + "\n"
