"""What a method does to the whole model while it trains, driven by a trainer's events.

Asks the model, never names a method: for adapters that do not steer, all of this does nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltaw.adapters import PeftConfig, adapters_named
from deltaw.atomic import aside
from deltaw.model import PeftModel

__all__ = ["STATE_NAME", "SteeringCallback", "prepare_resume", "read_state", "restore", "save_state"]

#: what a checkpoint holds beyond the adapters' files, so that a run can go on as if it had not stopped
STATE_NAME = "adapter_state.safetensors"

#: adapter name -> layer name -> name -> tensor
States = dict[str, dict[str, dict[str, Tensor]]]


class SteeringCallback(TrainerCallback):
    """Lets the adapters of a :class:`~deltaw.PeftModel` act on the model as a whole: AdaLoRA hands out its ranks.

    deltaw's trainer has it already; any other of transformers (TRL's too) takes it in ``callbacks``.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if isinstance(model, PeftModel):
            model.base_model.before_training(state.max_steps)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # a step that mixed precision skipped had no finite gradients to learn from
        if isinstance(model, PeftModel) and not getattr(optimizer, "step_was_skipped", False):
            model.base_model.update_and_allocate(state.global_step + 1)  # the trainer counts the step after this event


def save_state(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Writes ``adapter_state.safetensors`` into ``folder``, atomically; nothing where no adapter has a state."""
    tensors = {
        f"{name}/{layer}/{key}": tensor.detach().to("cpu").contiguous()
        for name in model.peft_config
        for layer, adapter in adapters_named(model.get_base_model(), name).items()
        for key, tensor in adapter.training_state().items()
    }
    if not tensors:
        return
    with aside(Path(folder) / STATE_NAME) as part:
        save_file(tensors, part, metadata={"format": "pt"})


def read_state(folder: str | os.PathLike[str]) -> States:
    """What :func:`save_state` wrote; empty where there is none."""
    path, states = Path(folder) / STATE_NAME, States()
    for where, tensor in (load_file(path) if path.is_file() else {}).items():
        name, rest = where.split("/", 1)
        layer, key = rest.rsplit("/", 1)
        states.setdefault(name, {}).setdefault(layer, {})[key] = tensor
    return states


def prepare_resume(model: PeftModel, name: str, folder: str | os.PathLike[str]) -> None:
    """Makes adapter ``name``, in place, ready for the tensors of the checkpoint in ``folder``."""
    adapters, config = adapters_named(model.get_base_model(), name), model.peft_config[name]
    for method in {type(adapter) for adapter in adapters.values() if adapter.steers}:
        saved = PeftConfig.from_pretrained(folder)
        if type(saved) is type(config):  # otherwise the tensors will not fit, and loading them says so
            method.resume(config, adapters, saved)


def restore(model: PeftModel, name: str, states: States) -> None:
    """Gives the adapters ``name`` their state back."""
    for layer, adapter in adapters_named(model.get_base_model(), name).items():
        if layer in states.get(name, {}):
            adapter.load_training_state(states[name][layer])
