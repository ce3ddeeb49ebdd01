"""Weights in four bits: NF4 and FP4 with double quantization, their layer, their files in bitsandbytes' format, and the
kernels that read them. Knows nothing of adapters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> the module that defines it, loaded on first use: a layer is read and adapted without transformers.
_PUBLIC = {
    "NF4Config": "deltaw.quant.config",
    "NF4Linear": "deltaw.quant.linear",
    "Packed": "deltaw.quant.packed",
    "QuantizationReport": "deltaw.quant.quantize",
    "QuantizedWeight": "deltaw.quant.store",
    "dequantize_4bit": "deltaw.quant.ops",
    "from_bnb": "deltaw.quant.bnb_format",
    "linear_4bit": "deltaw.quant.ops",
    "quantize_": "deltaw.quant.quantize",
    "quantize_4bit": "deltaw.quant.ops",
    "to_bnb": "deltaw.quant.bnb_format",
}

__all__ = [
    "NF4Config",
    "NF4Linear",
    "Packed",
    "QuantizationReport",
    "QuantizedWeight",
    "dequantize_4bit",
    "from_bnb",
    "linear_4bit",
    "quantize_",
    "quantize_4bit",
    "to_bnb",
]

if TYPE_CHECKING:
    from deltaw.quant.bnb_format import from_bnb, to_bnb
    from deltaw.quant.config import NF4Config
    from deltaw.quant.linear import NF4Linear
    from deltaw.quant.ops import dequantize_4bit, linear_4bit, quantize_4bit
    from deltaw.quant.packed import Packed
    from deltaw.quant.quantize import QuantizationReport, quantize_
    from deltaw.quant.store import QuantizedWeight


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'deltaw.quant' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
