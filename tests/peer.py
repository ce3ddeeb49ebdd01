"""Deltaw beside PEFT: the same model twice, the same seed, and what to compare."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import deltaw

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def pair(build: Callable[[], nn.Module], seed: int = 7, **fields: Any) -> tuple[Any, Any]:
    """(ours, PEFT's) on two equal bases, initialised from the same seed."""
    torch.manual_seed(seed)
    ours = deltaw.get_peft_model(build(), deltaw.LoraConfig(**copy.deepcopy(fields)))
    torch.manual_seed(seed)
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**copy.deepcopy(fields)))
    return ours, theirs


def stir(model: nn.Module, size: float = 0.05, adapter: str = "default") -> Any:
    """Adds noise to all that adapter trains, as training would; equal for parameters of equal names."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or f".{adapter}." in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter += noise.to(parameter.dtype)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def close(a: Tensor, b: Tensor, relative: float = 1e-6) -> bool:
    """Whether a and b agree relative to the largest value."""
    return bool((a - b).abs().max() <= relative * b.abs().max())


def adapted(model: nn.Module) -> set[str]:
    """Names of the modules that carry an adapter, ours or PEFT's."""
    return {name for name, m in model.named_modules() if hasattr(m, "lora_A") or hasattr(m, "lora_embedding_A")}


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, and of what trains."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether the model holds the very same names, order and bits as ``before``."""
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in before)


def in_order(value: Any) -> str:
    """A test's name for a value; the order of a set differs from process to process, and test names must not."""
    return str(sorted(value) if isinstance(value, set) else value)
