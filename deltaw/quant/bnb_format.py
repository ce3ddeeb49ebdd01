"""A packed weight as bitsandbytes writes it into a state dict, and back, strictly.

Keys, after the layer's name: ``weight``, ``weight.absmax``, ``weight.quant_map``, with double quantization also
``weight.nested_absmax`` and ``weight.nested_quant_map``, and ``weight.quant_state.bitsandbytes__nf4`` (or ``__fp4``),
the bytes of a JSON object with the rest. Knows nothing of modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import CheckpointError
from deltaw.quant.codebooks import codebook, dynamic_map
from deltaw.quant.packed import BLOCKSIZES, QUANT_TYPES, READ_AS, Packed

__all__ = ["KEYS", "STATE", "fitting", "from_bnb", "stored", "to_bnb"]

STATE = "weight.quant_state.bitsandbytes__"
#: every key that one weight may have
KEYS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(STATE + quant_type for quant_type in QUANT_TYPES),
)
#: how far a map in a file may be from ours: the published NF4 has been written in several precisions
MAP_TOLERANCE = 1e-6


def stored(codes: Tensor, storage: torch.dtype = torch.uint8) -> Tensor:
    """uint8 [bytes] -> the same memory as [bytes / itemsize, 1] of ``storage``."""
    return codes.view(storage)[:, None]


def to_bnb(packed: Packed, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """Tensors by key. On the meta device the JSON is empty: its numbers are not there yet."""
    device = packed.device
    tensors = {
        "weight": stored(packed.codes, storage),
        "weight.absmax": packed.absmax,
        # clones: safetensors refuses tensors that share memory
        "weight.quant_map": codebook(packed.quant_type, device).clone(),
    }
    state: dict[str, Any] = {
        "quant_type": packed.quant_type,
        "blocksize": packed.blocksize,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    if packed.nested_absmax is not None and packed.nested_offset is not None:
        tensors["weight.nested_absmax"] = packed.nested_absmax
        tensors["weight.nested_quant_map"] = dynamic_map(True, device).clone()
        state["nested_blocksize"] = packed.nested_blocksize
        state["nested_dtype"] = "float32"
        state["nested_offset"] = None if packed.nested_offset.is_meta else packed.nested_offset.item()
    blob = b"" if packed.codes.is_meta else json.dumps(state).encode()
    # bitsandbytes reads it from any device
    tensors[STATE + packed.quant_type] = torch.tensor(list(blob), dtype=torch.uint8, device=device)
    return tensors


def from_bnb(tensors: Mapping[str, Tensor]) -> Packed:
    """What :func:`to_bnb` or bitsandbytes wrote; shares the memory of the bytes and the statistics.

    Args:
        tensors: the keys of one weight, without the layer's name.

    Raises:
        CheckpointError: everything that is missing or does not fit, at once.
    """
    found = [quant_type for quant_type in QUANT_TYPES if STATE + quant_type in tensors]
    needed = ["weight", "weight.absmax", "weight.quant_map"]
    if any("nested" in key for key in tensors):
        needed += ["weight.nested_absmax", "weight.nested_quant_map"]
    missing = [key for key in needed if key not in tensors]
    if len(found) != 1:
        missing.append(f"exactly one of {' and '.join(STATE + quant_type for quant_type in QUANT_TYPES)}")
    if missing:
        raise CheckpointError(f"a 4-bit weight lacks {', '.join(missing)}; it has {sorted(tensors)}")
    state = _state(tensors[STATE + found[0]])
    faults = _faults_of_state(state, found[0], "weight.nested_absmax" in tensors)
    if not faults:
        faults = _faults_of_tensors(state, tensors)
    if faults:
        raise CheckpointError("a 4-bit weight cannot be read: " + "; ".join(faults))
    codes, absmax = tensors["weight"].detach(), tensors["weight.absmax"].detach()
    nested = tensors.get("weight.nested_absmax")
    return Packed(
        codes.contiguous().view(torch.uint8).view(-1),
        absmax.view(-1) if nested is not None else absmax.float().view(-1),
        None if nested is None else nested.detach().float().view(-1),
        None if nested is None else torch.tensor([state["nested_offset"]], dtype=torch.float32, device=codes.device),
        found[0],
        state["blocksize"],
        torch.Size(state["shape"]),
        getattr(torch, state["dtype"]),
        *([] if nested is None else [state["nested_blocksize"]]),
    )


def fitting(tensors: Mapping[str, Tensor], own: Packed, place: str) -> Packed:
    """:func:`from_bnb`, for a ``place`` ("layer", ...) that keeps a weight as ``own`` is kept.

    Raises:
        CheckpointError: it is no weight in four bits, or not of this shape or kind.
    """
    if [*tensors] == ["weight"] and tensors["weight"].shape == own.shape:
        raise CheckpointError(
            f"a weight in full, where this {place} keeps 4 bits: load it into the model before quantize_()"
        )
    packed = from_bnb(tensors)
    faults = [
        f"{what} is {theirs}, of this {place} {ours}"
        for what, theirs, ours in [
            ("shape", tuple(packed.shape), tuple(own.shape)),
            ("quant_type", packed.quant_type, own.quant_type),
            ("blocksize", packed.blocksize, own.blocksize),
            ("double quantization", packed.nested, own.nested),
            ("nested_blocksize", packed.nested_blocksize, own.nested_blocksize),
        ]
        if theirs != ours
    ]
    if faults:
        raise CheckpointError(f"a 4-bit weight does not fit: {'; '.join(faults)}")
    return packed


def _state(blob: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(blob.detach().cpu().to(torch.uint8).flatten().tolist()).decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"the quant_state of a 4-bit weight is not JSON ({error}): the file is damaged") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"the quant_state of a 4-bit weight is a {type(state).__name__}, not an object")
    return state


def _faults_of_state(state: dict[str, Any], quant_type: str, nested: bool) -> list[str]:
    """What does not fit among the values of the JSON."""
    faults = []

    def whole(value: object, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def need(key: str, fits: bool, expected: str) -> None:
        if not fits:
            faults.append(f"{key} is {state.get(key)!r}, not {expected}")

    need("quant_type", state.get("quant_type") == quant_type, f"{quant_type!r} as its key says")
    need("blocksize", whole(state.get("blocksize"), 1) and state["blocksize"] in BLOCKSIZES, f"one of {BLOCKSIZES}")
    read_as = [str(dtype).removeprefix("torch.") for dtype in READ_AS]
    need("dtype", state.get("dtype") in read_as, f"one of {read_as}")
    shape = state.get("shape")
    need("shape", isinstance(shape, list) and bool(shape) and all(whole(n, 0) for n in shape), "a list of sizes")
    if nested:
        size = state.get("nested_blocksize")
        need("nested_blocksize", whole(size, 1), "a number of values")
        need("nested_dtype", state.get("nested_dtype") == "float32", "'float32'")
        offset = state.get("nested_offset")
        need("nested_offset", isinstance(offset, (int, float)) and not isinstance(offset, bool), "a number")
    return faults


def _faults_of_tensors(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """What does not fit among the tensors, when the JSON is right."""
    faults = []
    n = torch.Size(state["shape"]).numel()
    blocks = -(-n // state["blocksize"])
    nested = "weight.nested_absmax" in tensors

    def need(key: str, count: int, *dtypes: torch.dtype) -> None:
        tensor = tensors[key]
        if tensor.numel() != count or tensor.dtype not in dtypes:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            faults.append(f"{key} is {_describe(tensor)}, not {count} values of {kinds} (shape {state['shape']})")

    weight = tensors["weight"]
    if weight.nbytes != (n + 1) // 2:
        faults.append(f"weight is {_describe(weight)}, not {(n + 1) // 2} bytes (shape {state['shape']})")
    if nested:
        need("weight.absmax", blocks, torch.uint8)
        need("weight.nested_absmax", -(-blocks // state["nested_blocksize"]), torch.float32)
    else:
        need("weight.absmax", blocks, *READ_AS)
    maps = {"weight.quant_map": (codebook, state["quant_type"])}
    if nested:
        maps["weight.nested_quant_map"] = (dynamic_map, True)
    for key, (ours, kind) in maps.items():
        values = tensors[key].detach()
        if values.is_meta:
            continue
        expected = ours(kind, values.device)
        if values.numel() != expected.numel():
            faults.append(f"{key} has {values.numel()} values, not {expected.numel()}")
        elif not torch.allclose(values.float().flatten(), expected, rtol=0, atol=MAP_TOLERANCE):
            faults.append(f"{key} is not the map of {kind if isinstance(kind, str) else 'signed dynamic 8 bits'}")
    return faults


def _describe(tensor: Tensor) -> str:
    return f"{tensor.numel()} values of {str(tensor.dtype).removeprefix('torch.')}"
