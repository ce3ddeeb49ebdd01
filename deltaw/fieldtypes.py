"""How a text becomes a value: the types of a run's keys, forgiving where YAML and shells are literal.

PyYAML reads ``1e-4`` as a string and a bare ``no`` as false; a shell hands over strings only. ``setting`` declares
a key with its group and its doc. Knows nothing of the keys themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

__all__ = [
    "Dtype",
    "Init",
    "Int",
    "Layers",
    "Names",
    "Pieces",
    "QuantType",
    "Ranks",
    "Resume",
    "SaveStrategy",
    "Shares",
    "Strategy",
    "Targets",
    "lowered",
    "setting",
]


def setting(group: str, default: Any, doc: str, *, methods: Iterable[str] = (), **limits: Any) -> Any:
    """A key of a run: the group it is shown under, its default, its doc, and the limits of its values.

    Args:
        methods: those that the key belongs to; empty for all of them.
    """
    extra: dict[str, Any] = {"group": group}
    if methods:
        extra["methods"] = list(methods)
    return Field(default, description=doc, json_schema_extra=extra, **limits)


def lowered(value: Any) -> Any:
    """``"DoRA"`` is ``"dora"``."""
    return value.lower() if isinstance(value, str) else value


def _whole(value: Any) -> Any:
    """``"1e3"`` and ``100.0`` are whole numbers too."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d*)?([eE][+-]?\d+)\s*", value):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _no(value: Any) -> Any:
    """YAML 1.1 reads a bare ``no`` as false."""
    return "no" if value is False else value


def _flow(value: Any) -> Any:
    """``"[a, b]"`` and ``"{a: 1}"`` from a shell are YAML's own short forms."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value


def _names(value: Any) -> Any:
    """A list of names; from a shell ``a,b``, ``[a, b]`` or one name."""
    value = _flow(value)
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _targets(value: Any) -> Any:
    """A list of names, or a regular expression, or ``all-linear``; plain names are never an expression."""
    value = _flow(value)
    if isinstance(value, str) and value != "all-linear" and re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)*", value):
        return _names(value)
    return value


def _dtype(value: Any) -> Any:
    value = str(value).removeprefix("torch.")
    return {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}.get(value, value)


def _resume(value: Any) -> Any:
    return {"true": True, "false": None}.get(str(value).lower(), value)


def _pieces(value: Any) -> Any:
    """``report_to``: one name stays a name, several are a list."""
    value = _flow(value)
    return _names(value) if isinstance(value, str) and "," in value else value


QuantType = Annotated[Literal["nf4", "fp4"], BeforeValidator(lowered)]
Int = Annotated[int, BeforeValidator(_whole)]
Init = (
    bool
    | Literal["gaussian", "orthogonal", "pissa", "olora", "loftq"]
    | Annotated[str, Field(pattern=r"^pissa_niter_\d+$")]
)
Strategy = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_no)]
SaveStrategy = Annotated[Literal["no", "steps", "epoch", "best"], BeforeValidator(_no)]
Names = Annotated[list[str], BeforeValidator(_names)]
Shares = Annotated[list[float], BeforeValidator(_names)]
Layers = Annotated[list[int], BeforeValidator(lambda v: [v] if isinstance(v, int) else _names(v))]
Targets = Annotated[str | list[str], BeforeValidator(_targets)]
Ranks = Annotated[dict[str, Annotated[int, Field(gt=0)]], BeforeValidator(_flow)]
Dtype = Annotated[Literal["auto", "bfloat16", "float16", "float32"], BeforeValidator(_dtype)]
Resume = Annotated[bool | str | None, BeforeValidator(_resume)]
Pieces = Annotated[str | list[str], BeforeValidator(_pieces)]
