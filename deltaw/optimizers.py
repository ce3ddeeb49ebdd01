"""The optimizers by name, for people: what each keeps, what it costs, and which arguments it takes.

Imports nothing heavy: a run's ``optim`` and ``optim_args`` are checked with this table before any weight is loaded.
What the optimizers do is said in ``optim/``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaw.errors import did_you_mean

__all__ = ["OPTIMIZERS", "OTHERS", "Optimizer", "argument_faults", "arguments_of", "name_fault"]


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes:
        what: what it keeps, in a line.
        made: name of its class, in ``deltaw.optim`` or else in ``torch.optim``; empty where transformers makes it.
        bytes_kept: of states, an element of a large parameter.
        arguments: what ``optim_args`` may say, with the type of each.
    """

    what: str
    made: str
    bytes_kept: float
    arguments: Mapping[str, type] = field(default_factory=dict)


_8BIT = {"min_8bit_size": int}
_PAGED = {"paged_from": int, "page_dir": str}
_8BIT_BYTES = 2 + 2 * 4 / 256  # two codes, and a float32 absmax for each 256 of them

_ADAMW_8BIT = Optimizer("AdamW, both moments in 8 bits", "AdamW8bit", _8BIT_BYTES, _8BIT)
_PAGED_32BIT = Optimizer("AdamW, moments that leave memory when it is short", "PagedAdamW32bit", 8, _PAGED)

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch_fused": Optimizer("AdamW, both moments in 32 bits; one kernel", "", 8),
    "adamw_torch": Optimizer("AdamW, both moments in 32 bits; a kernel an operation", "", 8),
    "adamw_8bit": _ADAMW_8BIT,
    "adamw_bnb_8bit": _ADAMW_8BIT,
    "paged_adamw": _PAGED_32BIT,
    "paged_adamw_32bit": _PAGED_32BIT,
    "paged_adamw_8bit": Optimizer("both", "PagedAdamW8bit", _8BIT_BYTES, _8BIT | _PAGED),
    "sgd": Optimizer(
        "nothing; with momentum, one moment", "SGD", 0, {"momentum": float, "dampening": float, "nesterov": bool}
    ),
}
#: further ones of transformers, some of which need packages of their own
OTHERS = (
    *("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"),
    *("adamw_torch_4bit", "adamw_torch_8bit", "adafactor", "adagrad", "rmsprop", "stable_adamw", "grokadamw"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
    *("lomo", "adalomo", "apollo_adamw", "apollo_adamw_layerwise"),
    *("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
)
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")


def name_fault(name: str) -> str:
    """What is wrong with ``optim: name``; empty if there is such an optimizer."""
    known = (*OPTIMIZERS, *OTHERS)
    if name in known:
        return ""
    return "no such optimizer" + (did_you_mean(name, known) or f"; there are {', '.join(OPTIMIZERS)}")


def arguments_of(name: str, text: str | None) -> dict[str, Any]:
    """``optim_args``, ``key=value`` pairs with commas between, as arguments of one of ``OPTIMIZERS``.

    Raises:
        ValueError: what :func:`argument_faults` tells.
    """
    if faults := argument_faults(name, text):
        raise ValueError(f"optim_args = {text!r}: " + "; ".join(faults))
    known = OPTIMIZERS[name].arguments
    return {key: _read(value, known[key]) for key, value in _pairs(text)}


def argument_faults(name: str, text: str | None) -> list[str]:
    """All that is wrong with ``optim_args`` for the optimizer ``name``; those of ``OTHERS`` are not looked at."""
    if name not in OPTIMIZERS:
        return []
    known, faults = OPTIMIZERS[name].arguments, []
    for key, value in _pairs(text):
        if key not in known:
            near = did_you_mean(key, known) or f"; it takes {', '.join(known) or 'none'}"
            faults.append(f"{name} takes no argument {key!r}{near}")
            continue
        try:
            _read(value, known[key])
        except ValueError:
            faults.append(f"{key} = {value!r} is no {known[key].__name__}")
    return faults


def _pairs(text: str | None) -> list[tuple[str, str]]:
    parts = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    return [(key.strip(), value.strip()) for key, _, value in parts]


def _read(value: str, kind: type) -> Any:
    if kind is bool:
        if value.lower() not in _TRUE + _FALSE:
            raise ValueError(value)
        return value.lower() in _TRUE
    if not value:
        raise ValueError(value)
    return kind(value)
