"""bitsandbytes as a peer: imported offline and quietly, in one place."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from deltaw.quant.packed import Packed

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # its CPU backend asks a hub for a kernel when it is imported
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it reports that it could not
    try:
        import bitsandbytes
        import bitsandbytes.functional
        import bitsandbytes.nn
    finally:
        logging.disable(_level)

__all__ = ["bitsandbytes", "dequantize", "layer", "quantize", "state_of"]

functional: Any = bitsandbytes.functional


def quantize(
    weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, *, nested: bool = False
) -> tuple[Tensor, Any]:
    """(packed bytes [(n + 1) // 2, 1], QuantState)."""
    return functional.quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)


def dequantize(codes: Tensor, state: Any) -> Tensor:
    with torch.compiler.set_stance("force_eager"):  # it compiles its fallback, which takes seconds
        return functional.dequantize_4bit(codes, state)


def layer(
    weight: Tensor,
    quant_type: str = "nf4",
    *,
    nested: bool = False,
    bias: Tensor | None = None,
    storage: torch.dtype = torch.uint8,
    compute_dtype: torch.dtype | None = None,
) -> Any:
    """A ``Linear4bit`` on the CPU that holds ``weight`` (out, in), quantized."""
    made = bitsandbytes.nn.Linear4bit(
        *weight.shape[::-1],
        bias=bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    made.weight.data = weight.clone()
    if bias is not None:
        made.bias.data = bias.clone()
    return made.to("cpu")


def state_of(packed: Packed) -> tuple[Tensor, Any]:
    """The same bytes as (packed bytes, QuantState)."""
    code = functional.get_4bit_type(packed.quant_type, device="cpu")
    inner = offset = None
    if packed.nested_absmax is not None and packed.nested_offset is not None:
        offset = packed.nested_offset[0]
        inner = functional.QuantState(
            absmax=packed.nested_absmax,
            blocksize=packed.nested_blocksize,
            code=functional.create_dynamic_map(),
            dtype=torch.float32,
        )
    state = functional.QuantState(
        absmax=packed.absmax,
        shape=packed.shape,
        code=code,
        blocksize=packed.blocksize,
        quant_type=packed.quant_type,
        dtype=packed.dtype,
        offset=offset,
        state2=inner,
    )
    return packed.codes[:, None], state
