"""Find, match, swap and freeze submodules by their dotted names. Knows nothing of adapters or weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = [
    "dtype_of",
    "frozen",
    "is_checkpointing",
    "layer_index",
    "matches",
    "modes_kept",
    "name_of",
    "parameter_sizes",
    "pattern_value",
    "set_submodule",
    "split_name",
    "tied_to_embedding",
    "weight_owners",
]


def split_name(name: str) -> tuple[str, str]:
    """``"a.b.c"`` -> ``("a.b", "c")``; a top-level name has the empty parent."""
    parent, _, child = name.rpartition(".")
    return parent, child


def set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` in the place called ``name``, in its parent's own order."""
    parent, child = split_name(name)
    setattr(model.get_submodule(parent), child, new)


def name_of(model: nn.Module, wanted: nn.Module) -> str | None:
    """The dotted name of ``wanted`` inside ``model``, or None when it is not there."""
    return next((name for name, module in model.named_modules() if module is wanted), None)


def matches(name: str, spec: str | Iterable[str]) -> bool:
    """PEFT's rule for naming modules: a string is a full regular expression, a list holds exact names or
    suffixes."""
    if isinstance(spec, str):
        return re.fullmatch(spec, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in spec)


def layer_index(name: str, patterns: str | Sequence[str] | None) -> int | None:
    """The number of the repeated layer that ``name`` lies in, or None.

    ``patterns`` names the list that holds the layers (``"layers"``, ``"h"``); without it the first number
    counts.
    """
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found.group(1)) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1))
    return None


def pattern_value(patterns: Mapping[str, int | float], name: str) -> tuple[str, int | float] | None:
    """The first entry of a ``rank_pattern``/``alpha_pattern`` whose key matches ``name``, as (key, value)."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return key, value
    return None


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The floating dtype of a module's first floating parameter, or None when it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def weight_owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Parameter -> dotted names of every place where it is registered (two or more: tied weights)."""
    owners: dict[nn.Parameter, list[str]] = {}
    for prefix, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                owners.setdefault(value, []).append(f"{prefix}.{key}" if prefix else key)
    return owners


def parameter_sizes(model: nn.Module) -> dict[nn.Parameter, int]:
    """Parameter -> how many weights it is counted as; tied ones once.

    That is its own size, except where its module keeps weights packed and says otherwise (``logical_sizes()``, by name
    of parameter): bytes count as the weights that they hold, and the statistics beside them not at all.
    """
    sizes: dict[nn.Parameter, int] = {}
    for module in model.modules():
        logical = module.logical_sizes() if hasattr(module, "logical_sizes") else {}  # type: ignore[operator]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                sizes.setdefault(parameter, logical.get(name, parameter.numel()))
    return sizes


def tied_to_embedding(model: nn.Module) -> list[str]:
    """Dotted names of the parameters, elsewhere in a transformers model, that are its input embedding's own weight (a
    tied output head's, above all)."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    if not isinstance(embedding, nn.Module):
        return []
    weight = next(embedding.parameters(), None)  # of an embedding that is wrapped, the original's comes first
    inside = f"{name_of(model, embedding)}."
    return [] if weight is None else [n for n in weight_owners(model)[weight] if not n.startswith(inside)]


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any part of a transformers model recomputes its activations in backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Sets ``requires_grad`` to False inside the block and restores each flag after it."""
    kept = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in kept:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in kept:
            p.requires_grad_(flag)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode, training or evaluation, that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
