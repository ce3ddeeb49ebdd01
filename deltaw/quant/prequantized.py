"""What a model's config says of how its weights are kept: in full, in four bits as they are read here, or in a way that
is not. Knows nothing of tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from deltaw.errors import ModelError
from deltaw.quant.config import NF4Config
from deltaw.quant.hfquantizer import METHOD

__all__ = ["quantization_of", "read_here"]

log = logging.getLogger("deltaw")

#: ways of quantizing that transformers can undo while it loads -> the config that asks for it
UNDONE = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config", "gguf": "GgufConfig"}
#: what must agree between a folder's packed bytes and a config that is given beside it
PACKED_AS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def quantization_of(config: Mapping[str, Any], name: str) -> NF4Config | None:
    """How the weights of a model are kept in its files: None when they are in full.

    Args:
        config: what ``config.json`` holds.
        name: of the model, for errors.

    Raises:
        ModelError: quantized in a way that is not read here (8 bits, GPTQ, AWQ, ...).
    """
    inner = config.get("text_config")
    said = config.get("quantization_config") or (
        inner.get("quantization_config") if isinstance(inner, Mapping) else None
    )
    if not said:
        return None
    method = str(said.get("quant_method", "bitsandbytes")).removesuffix("_4bit")
    four = bool(said.get("load_in_4bit") or said.get("_load_in_4bit"))
    if method == METHOD or (method == "bitsandbytes" and four):
        return NF4Config.from_dict({**said, "load_in_4bit": True})
    if method.startswith("bitsandbytes"):
        method = "bitsandbytes in 8 bits"
    cure = "load the model in full that it was made from, with quantization_config=NF4Config() for 4 bits"
    if undone := UNDONE.get(method):
        cure += f", or have it undone with quantization_config=transformers.{undone}(dequantize=True)"
    raise ModelError(f"model {name!r} is quantized with {method}, which cannot carry adapters here: {cure}")


def read_here(config: Any, found: NF4Config, asked: NF4Config | None) -> NF4Config:
    """Makes transformers hand a model whose files hold 4-bit weights to our quantizer.

    Args:
        config: the model's, an object; changed.
        found: :func:`quantization_of` it.
        asked: given beside it; what it says of computing counts, what it says of packing is settled by the files.
    """
    if asked is not None:
        other = [n for n in PACKED_AS if getattr(asked, n) != getattr(found, n)]
        if other:
            told = ", ".join(f"{n}={getattr(found, n)!r}" for n in other)
            log.warning("the model's files hold 4-bit weights already, with %s: they are taken as they are", told)
        found.bnb_4bit_compute_dtype = asked.bnb_4bit_compute_dtype
    # transformers looks this dictionary's method up; with load_in_4bit in it, it would take bitsandbytes for it
    said = {key: value for key, value in found.to_dict().items() if key not in ("load_in_4bit", "load_in_8bit")}
    config.quantization_config = said | {"quant_method": METHOD}
    return found
