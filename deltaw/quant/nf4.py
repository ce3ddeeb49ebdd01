"""Block-wise 4-bit quantization in plain PyTorch, as the QLoRA paper writes it (Dettmers et al. 2023, arXiv 2305.14314,
sections 2 and 3): the reference that every other backend is tested against, and what runs where none of them can.

A weight is flattened and cut into blocks. Of each, absmax = max |w|, and q = the code nearest to w / absmax. Double
quantization does the same, in 8 bits, to the absmax values less their mean.

Works on a few blocks at a time, so that it needs little more memory than what it reads and writes. Knows nothing of
modules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.quant.codebooks import codebook, dynamic_map, dynamic_thresholds, order, thresholds
from deltaw.quant.packed import Packed

__all__ = ["dequantize_4bit", "dequantize_8bit", "linear_4bit", "quantize_4bit", "quantize_8bit", "unavailable"]

#: elements at a time, so few that they stay in a cache; a multiple of every blocksize
CHUNK = 1 << 16
#: a block of smaller values is divided by this instead of by its absmax, whose reciprocal would not be finite
SMALLEST = 1e-38


def unavailable(device: torch.device) -> str:
    return ""


@torch.no_grad()
def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """A block of zeros has absmax 0. A NaN takes the last code, and makes the absmax of its block NaN."""
    n = weight.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=weight.device)
    if weight.is_meta:
        return codes, absmax
    flat = weight.view(-1)
    bounds, descending = thresholds(quant_type, weight.device), order(quant_type, weight.device).flip(0)
    for part in _chunks(n):
        blocks = slice(part.start // blocksize, -(-part.stop // blocksize))
        values, absmax[blocks] = _scaled(flat[part], blocksize)
        reached = torch.zeros_like(values, dtype=torch.uint8)  # thresholds that the value is not above
        for bound in bounds:  # five times faster than torch.bucketize
            reached += values <= bound
        nibbles = descending.index_select(0, reached.int())
        pairs = F.pad(nibbles, (0, nibbles.numel() % 2), value=int(descending[(bounds >= 0).sum()]))
        codes[part.start // 2 : (part.stop + 1) // 2] = pairs[::2] << 4 | pairs[1::2]
    return codes, absmax


@torch.no_grad()
def dequantize_4bit(packed: Packed, out: Tensor) -> None:
    if out.is_meta:
        return
    flat = out.view(-1)
    for part in _chunks(packed.numel()):
        flat[part] = _values(packed, part)  # rounds to nearest even


@torch.no_grad()
def linear_4bit(x: Tensor, packed: Packed) -> Tensor:
    rows, width = packed.shape
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    if out.is_meta:
        return out
    wide = x.float()
    step = max(1, CHUNK // max(1, width))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = _values(packed, slice(start * width, stop * width)).to(packed.dtype).float().view(stop - start, width)
        out[:, start:stop] = wide @ weight.T
    return out


@torch.no_grad()
def quantize_8bit(values: Tensor, signed: bool, blocksize: int) -> tuple[Tensor, Tensor]:
    """A block of zeros has absmax 0 and the code of zero. A NaN takes the last code."""
    n = values.numel()
    codes = torch.empty(n, dtype=torch.uint8, device=values.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=values.device)
    if values.is_meta:
        return codes, absmax
    bounds = dynamic_thresholds(signed, values.device)
    for part in _chunks(n):
        blocks = slice(part.start // blocksize, -(-part.stop // blocksize))
        scaled, absmax[blocks] = _scaled(values[part], blocksize)
        codes[part] = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return codes, absmax


@torch.no_grad()
def dequantize_8bit(codes: Tensor, absmax: Tensor, signed: bool, blocksize: int, out: Tensor) -> None:
    if out.is_meta:
        return
    for part in _chunks(codes.numel()):
        scale = absmax[part.start // blocksize : -(-part.stop // blocksize)]
        out[part] = _times(dynamic_map(signed, codes.device).index_select(0, codes[part].int()), scale, blocksize)


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def _scaled(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Values in whole blocks, the last one maybe shorter -> (values / absmax, float32 [n], absmax [blocks])."""
    n = values.numel()
    blocks = F.pad(values.float(), (0, -n % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    # times the reciprocal, as bitsandbytes: a division would round some values to the other side of a threshold
    return (blocks * absmax.clamp(min=SMALLEST).reciprocal()[:, None]).view(-1)[:n], absmax


def _values(packed: Packed, part: slice) -> Tensor:
    """The elements ``part`` of the flattened weight, float32: code * scale."""
    size = packed.blocksize
    first, last = part.start // size, -(-part.stop // size)
    lead = part.start - first * size  # a part may begin inside of a block
    pairs = packed.codes[first * size // 2 : min(last * size, packed.numel() + 1) // 2].int()
    nibbles = torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1)
    values = codebook(packed.quant_type, packed.device).index_select(0, nibbles)
    return _times(values, _scales(packed, first, last), size)[lead : lead + part.stop - part.start]


def _scales(packed: Packed, first: int, last: int) -> Tensor:
    """absmax of the blocks [first, last), float32."""
    if packed.nested_absmax is None or packed.nested_offset is None:
        return packed.absmax[first:last]
    codes = packed.absmax[first:last].int()
    groups = torch.arange(first, last, device=packed.device) // packed.nested_blocksize
    scale = dynamic_map(True, packed.device).index_select(0, codes) * packed.nested_absmax[groups]
    return scale + packed.nested_offset  # rounded twice: a fused multiply-add would give other bits


def _times(values: Tensor, scale: Tensor, blocksize: int) -> Tensor:
    """values * the scale of their block."""
    n = values.numel()
    return (F.pad(values, (0, -n % blocksize)).view(-1, blocksize) * scale[:, None]).view(-1)[:n]
