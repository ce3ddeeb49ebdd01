"""The backend for CUDA: what a :class:`Packed` weight needs, handed to the kernels of ``triton_kernels.py``.

Launches only: nothing here reads from the device, so that it runs under the compiler and inside CUDA graphs; the one
wait is for the fastest tile, the first time. triton itself is imported at the first launch.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.quant import codebooks
from deltaw.quant.nf4 import SMALLEST
from deltaw.quant.packed import Packed

__all__ = ["dequantize_4bit", "dequantize_8bit", "linear_4bit", "quantize_4bit", "quantize_8bit", "unavailable"]

#: elements a program packs
TILE = 1024
#: (elements, warps) of a program that reads: with eight elements a thread, a word is read and 16 bytes are written. All
#: write the same bits; from LARGE elements on it pays to find the fastest, once for each device, dtype and blocksize.
#: The product has no such choice: the order in which it is summed may not depend on a clock
TILES = ((1024, 4), (2048, 4), (2048, 8), (4096, 8))
LARGE = 1 << 22
#: outputs of a program of :func:`linear_4bit`, one tensor-core tile of each of its four warps; and inputs a round
TILE_OUT, TILE_IN = 64, 128
#: rows a program multiplies with; the tensor cores take no fewer
LEAST_ROWS, MOST_ROWS = 16, 64
#: programs of :func:`linear_4bit` for each multiprocessor, so that enough reads are under way to fill the memory's time
PROGRAMS = 4


def unavailable(device: torch.device) -> str:
    if device.type != "cuda":
        return f"no CUDA device ({device.type})"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """A block of zeros has absmax 0; a NaN makes the absmax of its block NaN, as in the reference."""
    n = weight.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=weight.device)
    if n:
        blocks = max(1, TILE // blocksize)
        with _on(weight.device):
            _kernels().quantize_4bit[(-(-n // (blocks * blocksize)),)](
                weight,
                codes,
                absmax,
                _thresholds(quant_type, weight.device),
                codebooks.order(quant_type, weight.device),
                n,
                codes.numel(),
                SMALLEST,
                BLOCKSIZE=blocksize,
                BLOCKS=blocks,
                enable_fp_fusion=False,
            )
    return codes, absmax


def dequantize_4bit(packed: Packed, out: Tensor) -> None:
    n = packed.numel()
    if not n:
        return
    arguments = (*_read(packed), out, n, packed.codes.numel(), packed.blocksize, _nested_blocksize(packed))
    kernel = _kernels().dequantize_4bit

    def launch(tile: int, warps: int) -> None:
        kernel[(-(-n // tile),)](*arguments, TILE=tile, num_warps=warps, enable_fp_fusion=False)

    with _on(out.device):
        launch(*_tile(n, (out.device, out.dtype, packed.blocksize, packed.nested), launch))


def linear_4bit(x: Tensor, packed: Packed) -> Tensor:
    """The weight is rounded to ``packed.dtype``, as when it is read; the product is summed in float32, in an order that
    depends on the shapes and the device alone."""
    rows, width = x.shape
    outputs = packed.shape[0]
    if not rows or not outputs or not width:
        return torch.zeros(rows, outputs, dtype=x.dtype, device=x.device)
    tile_rows = min(max(LEAST_ROWS, 1 << (rows - 1).bit_length()), MOST_ROWS)
    tiles = (-(-outputs // TILE_OUT), -(-rows // tile_rows))
    piece = _piece(width, tiles[0] * tiles[1], _multiprocessors(x.device))
    pieces = -(-width // piece)
    # one program sums over all inputs, or a few over a piece each
    dtype = x.dtype if pieces == 1 else torch.float32
    out = torch.empty(pieces, rows, outputs, dtype=dtype, device=x.device)
    modern = _has_bfloat16(x.device)
    half = (torch.float16, torch.bfloat16) if modern else (torch.float16,)
    fed = x.contiguous() if x.dtype in half else x.float().contiguous()
    with _on(x.device):
        _kernels().linear_4bit[(tiles[0], pieces, tiles[1])](
            fed,
            *_read(packed),
            out,
            rows,
            outputs,
            width,
            piece,
            BLOCKSIZE=packed.blocksize,
            NESTED_BLOCKSIZE=_nested_blocksize(packed),
            STORED=_kernels().DTYPES[packed.dtype],
            SPLIT=modern and fed.dtype == torch.float32 and packed.dtype == torch.bfloat16,
            PRECISION="tf32x3" if modern and packed.dtype == torch.float16 else "ieee",  # that holds a float16 whole
            SHARE=math.gcd(width, packed.blocksize, TILE_IN),
            FULL=width % TILE_IN == 0,
            TILE_OUT=TILE_OUT,
            TILE_IN=TILE_IN,
            TILE_ROWS=tile_rows,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return out[0] if pieces == 1 else out.sum(0).to(x.dtype)


def quantize_8bit(values: Tensor, signed: bool, blocksize: int) -> tuple[Tensor, Tensor]:
    n = values.numel()
    codes = torch.empty(n, dtype=torch.uint8, device=values.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=values.device)
    if n:
        blocks = max(1, TILE // blocksize)
        with _on(values.device):
            _kernels().quantize_8bit[(-(-n // (blocks * blocksize)),)](
                values,
                codes,
                absmax,
                _dynamic_thresholds(signed, values.device),
                n,
                SMALLEST,
                BLOCKSIZE=blocksize,
                BLOCKS=blocks,
                enable_fp_fusion=False,
            )
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, signed: bool, blocksize: int, out: Tensor) -> None:
    n = codes.numel()
    if n:
        with _on(codes.device):
            _kernels().dequantize_8bit[(-(-n // TILE),)](
                codes,
                absmax,
                codebooks.dynamic_map(signed, codes.device),
                out,
                n,
                BLOCKSIZE=blocksize,
                TILE=TILE,
                enable_fp_fusion=False,
            )


def _kernels() -> ModuleType:
    from deltaw.quant import triton_kernels

    return triton_kernels


def _read(packed: Packed) -> tuple[Tensor, ...]:
    """What a kernel reads a weight from; what it does not read without double quantization is filled with absmax."""
    return (
        packed.codes,
        packed.absmax,
        codebooks.dynamic_map(True, packed.device) if packed.nested else packed.absmax,
        packed.absmax if packed.nested_absmax is None else packed.nested_absmax,
        packed.absmax if packed.nested_offset is None else packed.nested_offset,
        codebooks.codebook(packed.quant_type, packed.device),
    )


def _nested_blocksize(packed: Packed) -> int:
    return packed.nested_blocksize if packed.nested else 0


_fastest: dict[tuple, tuple[int, int]] = {}


def _tile(n: int, key: tuple, launch: Callable[[int, int], None]) -> tuple[int, int]:
    if n < LARGE:
        return TILES[0]
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():  # a graph under way cannot wait for a clock
            return TILES[0]
        _fastest[key] = min(TILES, key=lambda tile: _time(launch, tile))
    return _fastest[key]


def _time(launch: Callable[[int, int], None], tile: tuple[int, int]) -> float:
    """Milliseconds of ten calls on the device."""
    launch(*tile)  # compiles
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # a millisecond in which the launches queue up, so that they themselves are not timed
    started.record()
    for _ in range(10):
        launch(*tile)
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended)


# a table in a kernel has a power of two of elements: one more than there are thresholds


@functools.cache
def _thresholds(quant_type: str, device: torch.device) -> Tensor:
    return F.pad(codebooks.thresholds(quant_type, device), (0, 1))


@functools.cache
def _dynamic_thresholds(signed: bool, device: torch.device) -> Tensor:
    return F.pad(codebooks.dynamic_thresholds(signed, device), (0, 1))


def _piece(width: int, tiles: int, multiprocessors: int) -> int:
    """Inputs that one program sums over, a multiple of TILE_IN: all, unless that would leave multiprocessors idle."""
    rounds = -(-width // TILE_IN)
    pieces = min(rounds, -(-PROGRAMS * multiprocessors // tiles)) if tiles < PROGRAMS * multiprocessors else 1
    return -(-rounds // pieces) * TILE_IN


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    """Whether the tensor cores take bfloat16, and float32 in parts: from Ampere on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _on(device: torch.device) -> torch.cuda.device:
    """A kernel is launched on the current device, which need not be that of its tensors."""
    return torch.cuda.device(device)
