"""Which class a trainer's ``optim`` means, and how much memory its states take.

Knows the table of ``deltaw.optimizers`` and nothing of trainers: it reads their arguments by name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaw.errors import ConfigError
from deltaw.optimizers import OPTIMIZERS, arguments_of

__all__ = ["StateBytes", "optimizer_for", "state_bytes"]


def optimizer_for(
    args: Any, model: nn.Module | None = None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The optimizer that ``args.optim`` names, with its arguments; None if it is not one of those made here.

    Args:
        args: has ``optim``, ``optim_args``, ``learning_rate``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon``, as
            transformers' ``TrainingArguments``.
        model: embeddings that it trains keep their states in 32 bits (arXiv 2110.02861, section 2.3).

    Raises:
        ConfigError: ``optim_args`` that the optimizer does not take.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name not in OPTIMIZERS or not OPTIMIZERS[name].made:
        return None
    try:
        arguments = {"lr": args.learning_rate, **arguments_of(name, args.optim_args)}
    except ValueError as error:
        raise ConfigError(f"optim = {name!r}: {error}") from None
    kind = getattr(importlib.import_module("deltaw.optim.adamw"), OPTIMIZERS[name].made, None)
    if kind is None:
        return getattr(torch.optim, OPTIMIZERS[name].made), arguments
    arguments |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if model is not None:
        tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        arguments["keep_float32"] = [table for table in tables if table.requires_grad]
    return kind, arguments


@dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's states.

    Attributes:
        total: all of them.
        paged: those that can leave memory when it is short.
    """

    total: int
    paged: int

    def __str__(self) -> str:
        paged = f", {self.paged / 2**20:,.1f} MiB of it paged" if self.paged else ""
        return f"{self.total / 2**20:,.1f} MiB{paged}"


def state_bytes(optimizer: Any) -> StateBytes:
    """What the states of any optimizer take now, measured by their tensors; nothing before its first step."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    local: Any = [getattr(t, "_local_tensor", t) for t in tensors]  # of a sharded one, what is here
    inner = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
    paged = inner.paged_bytes() if hasattr(inner, "paged_bytes") else 0
    return StateBytes(sum(t.nbytes for t in local), paged)
