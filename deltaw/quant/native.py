"""The kernels for CPUs: a small C library (``csrc/``), compiled when the package is installed, called through ctypes.

It picks the widest of AVX-512 with BF16, AVX-512, AVX2 and plain C that the machine has, and uses as many threads as
torch. Where it was not compiled, another backend is taken. Knows nothing of modules.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import ConfigError, did_you_mean
from deltaw.quant.codebooks import codebook, dynamic_map, order, thresholds
from deltaw.quant.packed import Packed

__all__ = [
    "INSTRUCTION_SETS",
    "VARIABLE",
    "adamw_8bit",
    "dequantize_4bit",
    "dequantize_8bit",
    "instruction_set",
    "linear_4bit",
    "quantize_4bit",
    "quantize_8bit",
    "select",
    "unavailable",
]

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "generic")
#: forces one of them
VARIABLE = "DELTAW_NATIVE_ISA"

_ABI = 1  # DW_ABI of csrc/deltaw.h: another number is a library of another version
_NAMES = ("libdeltaw_quant.so", "libdeltaw_quant.dll")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum dw_dtype
_CPU = torch.device("cpu")

_pointer, _size, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


# The structs of csrc/deltaw.h, field by field.


class _Codebook(ctypes.Structure):
    _fields_ = (("value", _float * 16), ("threshold", _float * 15), ("order", ctypes.c_uint8 * 16))


class _Map(ctypes.Structure):
    _fields_ = (("value", _float * 256), ("threshold", _float * 256), ("lowest", ctypes.c_uint8 * (23 * 128 + 1) * 2))


class _Packed(ctypes.Structure):
    _fields_ = (
        ("n", _size),
        ("blocksize", _size),
        ("codes", _pointer),
        ("absmax", _pointer),
        ("nested_absmax", _pointer),
        ("nested_offset", _pointer),
        ("nested_map", _pointer),
        ("nested_blocksize", _size),
        ("value", _pointer),
    )


class _AdamW(ctypes.Structure):
    _fields_ = (
        ("n", _size),
        ("blocksize", _size),
        ("parameter", _pointer),
        ("gradient", _pointer),
        ("gradient_dtype", _int),
        ("first", _pointer),
        ("second", _pointer),
        ("first_absmax", _pointer),
        ("second_absmax", _pointer),
        ("first_map", _pointer),
        ("second_map", _pointer),
        ("decay", _float),
        ("first_weight", _float),
        ("beta2", _float),
        ("second_weight", _float),
        ("root_correction", _float),
        ("eps", _float),
        ("step_size", _float),
    )


_SIGNATURES = {
    "dw_abi": (_int, ()),
    "dw_openmp": (_int, ()),
    "dw_select": (_int, (ctypes.c_char_p,)),
    "dw_isa": (ctypes.c_char_p, ()),
    "dw_map_init": (_int, (_pointer, _pointer)),
    "dw_quantize_4bit": (None, (_pointer, _int, _size, _size, _pointer, _pointer, _pointer, _int)),
    "dw_dequantize_4bit": (None, (_pointer, _pointer, _int, _int)),
    "dw_linear_4bit": (_int, (_pointer, _int, _size, _pointer, _int, _size, _pointer, _int)),
    "dw_quantize_8bit": (None, (_pointer, _size, _size, _pointer, _pointer, _pointer, _int)),
    "dw_dequantize_8bit": (None, (_pointer, _pointer, _size, _size, _pointer, _pointer, _int)),
    "dw_adamw_8bit": (None, (_pointer, _int)),
}


# --- the library --------------------------------------------------------------------------------------------


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The library beside this file, or why there is none."""
    path = next((path for path in map(Path(__file__).with_name, _NAMES) if path.exists()), None)
    if path is None:
        return None, "no kernels were compiled when deltaw was installed here; with a C compiler, `pip install` does"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded: {error}; `pip install` compiles it again"
    abi = library.dw_abi()
    if abi != _ABI:
        return (
            None,
            f"{path.name} was compiled for another version ({abi}, not {_ABI}); `pip install` compiles it again",
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _select(library, os.environ.get(VARIABLE, ""), f"{VARIABLE}=")
    return library, ""


def _loaded() -> ctypes.CDLL:
    library, why = _library()
    if library is None:
        raise ConfigError(f"the native kernels cannot run: {why}")
    return library


def unavailable(device: torch.device) -> str:
    return _library()[1] if device.type == "cpu" else "its kernels are for CPUs"


def instruction_set() -> str:
    """Which of :data:`INSTRUCTION_SETS` runs."""
    return _loaded().dw_isa().decode()


def select(name: str = "") -> None:
    """From here on the instruction set ``name`` runs; empty: the widest that there is.

    Raises:
        ConfigError: there is none of that name, or not on this machine.
    """
    _select(_loaded(), name, "instruction set ")


def _select(library: ctypes.CDLL, name: str, said: str) -> None:
    fault = library.dw_select(name.encode())
    if fault == 2:
        raise ConfigError(f"{said}{name!r}: this machine does not have it; leave it out for the widest that there is")
    if fault:
        near = did_you_mean(name, INSTRUCTION_SETS)
        raise ConfigError(f"{said}{name!r}: no such instruction set; there are {list(INSTRUCTION_SETS)}{near}")


@functools.cache
def _codebook(quant_type: str) -> _Codebook:
    return _Codebook(
        tuple(codebook(quant_type, _CPU).tolist()),
        tuple(thresholds(quant_type, _CPU).tolist()),
        tuple(order(quant_type, _CPU).tolist()),
    )


@functools.cache
def _map(signed: bool) -> _Map:
    made = _Map()
    values = dynamic_map(signed, _CPU).contiguous()
    if _loaded().dw_map_init(ctypes.byref(made), values.data_ptr()):
        raise ConfigError("the native kernels hold no such 8-bit map: two of its thresholds are too near each other")
    return made


# --- the backend --------------------------------------------------------------------------------------------


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    if weight.dtype not in _DTYPES:
        weight = weight.float()
    weight = weight.contiguous()
    n = weight.numel()
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
    _loaded().dw_quantize_4bit(
        weight.data_ptr(), _DTYPES[weight.dtype], n, blocksize, ctypes.byref(_codebook(quant_type)), codes.data_ptr(),
        absmax.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes, absmax


def dequantize_4bit(packed: Packed, out: Tensor) -> None:
    if out.dtype not in _DTYPES or not out.is_contiguous():
        wide = torch.empty(out.shape, dtype=torch.float32)
        dequantize_4bit(packed, wide)
        out.copy_(wide)
        return
    _fits(out.numel(), packed.numel(), "the output")
    weight = _weight(packed)
    _loaded().dw_dequantize_4bit(ctypes.byref(weight), out.data_ptr(), _DTYPES[out.dtype], torch.get_num_threads())


def linear_4bit(x: Tensor, packed: Packed) -> Tensor:
    outputs, columns = packed.shape
    _fits(x.shape[-1], columns, "a row of x")
    read_as = _DTYPES.get(packed.dtype, 0)
    if x.dtype not in _DTYPES:
        return linear_4bit(x.float(), packed).to(x.dtype)
    x = x.contiguous()
    out = torch.empty(x.shape[0], outputs, dtype=x.dtype)
    if not columns:
        return out.zero_()
    weight = _weight(packed)
    failed = _loaded().dw_linear_4bit(
        ctypes.byref(weight), read_as, outputs, x.data_ptr(), _DTYPES[x.dtype], x.shape[0], out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"linear_4bit: no memory for {x.shape[0]} rows of {columns} float32 values")
    return out


def quantize_8bit(values: Tensor, signed: bool, blocksize: int) -> tuple[Tensor, Tensor]:
    values = values.float().contiguous()
    n = values.numel()
    codes = torch.empty(n, dtype=torch.uint8)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32)
    _loaded().dw_quantize_8bit(
        values.data_ptr(), n, blocksize, ctypes.byref(_map(signed)), codes.data_ptr(), absmax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, signed: bool, blocksize: int, out: Tensor) -> None:
    n = codes.numel()
    _fits(absmax.numel(), -(-n // blocksize), "absmax")
    _fits(out.numel(), n, "the output")
    if out.dtype != torch.float32 or not out.is_contiguous():
        wide = torch.empty(n, dtype=torch.float32)
        dequantize_8bit(codes, absmax, signed, blocksize, wide)
        out.copy_(wide.view(out.shape))
        return
    codes, absmax = codes.contiguous(), absmax.float().contiguous()
    _loaded().dw_dequantize_8bit(
        codes.data_ptr(), absmax.data_ptr(), n, blocksize, ctypes.addressof(_map(signed)), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


def adamw_8bit(
    values: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    blocksize: int = 256,
) -> None:
    """One step of AdamW in one pass over parameters and states, in place: the moments are read from 8 bits, stepped in
    float32 as ``torch.optim.AdamW(fused=True)`` does, and packed again (Dettmers et al. 2022, arXiv 2110.02861, section
    2).

    Args:
        values: the parameters, float32 [n].
        grads: float32, bfloat16 or float16 [n].
        exp_avg, exp_avg_sq: codes of the signed and of the unsigned dynamic map, uint8 [n].
        exp_avg_absmax, exp_avg_sq_absmax: float32 [ceil(n / blocksize)].
        step: which one it is, counted from 1.
        blocksize: elements of a state that share one absmax; at most 4096.

    Raises:
        ConfigError: a tensor of another size or dtype, or not contiguous.
    """
    n, blocks = values.numel(), -(-values.numel() // blocksize)
    written = ((values, torch.float32, n), (exp_avg, torch.uint8, n), (exp_avg_sq, torch.uint8, n))
    written += ((exp_avg_absmax, torch.float32, blocks), (exp_avg_sq_absmax, torch.float32, blocks))
    for tensor, dtype, size in (*written, (grads, grads.dtype, n)):
        if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
            raise ConfigError(
                f"adamw_8bit: a tensor {tuple(tensor.shape)} of {tensor.dtype} where {size} contiguous elements of "
                f"{dtype} are needed"
            )
    if grads.dtype not in _DTYPES or not 0 < blocksize <= 4096:
        raise ConfigError(
            f"adamw_8bit: gradients in {grads.dtype}, blocksize {blocksize}; use floats, and 4096 at most"
        )
    settings = _AdamW(
        n, blocksize, values.data_ptr(), grads.data_ptr(), _DTYPES[grads.dtype], exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(), exp_avg_absmax.data_ptr(), exp_avg_sq_absmax.data_ptr(), ctypes.addressof(_map(True)),
        ctypes.addressof(_map(False)), 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2,
        math.sqrt(1 - beta2**step), eps, -lr / (1 - beta1**step),
    )  # fmt: skip
    _loaded().dw_adamw_8bit(ctypes.byref(settings), torch.get_num_threads())


def _weight(packed: Packed) -> _Packed:
    """What the library reads. It trusts the sizes, so they are looked at here."""
    codes, absmax, inner, offset = packed.codes, packed.absmax, packed.nested_absmax, packed.nested_offset
    n = packed.numel()
    blocks = -(-n // packed.blocksize)
    _fits(codes.nbytes, (n + 1) // 2, "codes")
    _fits(absmax.numel(), blocks, "absmax")
    read = _Packed(n=n, blocksize=packed.blocksize, codes=codes.data_ptr(), absmax=absmax.data_ptr())
    read.value = ctypes.addressof(_codebook(packed.quant_type))  # its first field
    wanted = torch.float32
    if inner is not None and offset is not None:
        wanted = torch.uint8
        _fits(inner.numel(), -(-blocks // packed.nested_blocksize), "nested_absmax")
        read.nested_absmax, read.nested_offset = inner.data_ptr(), offset.data_ptr()
        read.nested_map, read.nested_blocksize = ctypes.addressof(_map(True)), packed.nested_blocksize  # likewise
    if absmax.dtype != wanted or not (codes.is_contiguous() and absmax.is_contiguous()):
        raise ConfigError(
            f"a 4-bit weight {tuple(packed.shape)}: absmax is {absmax.dtype}, strides {absmax.stride()}, codes have "
            f"strides {codes.stride()}; absmax must be {wanted}, and both without gaps"
        )
    return read


def _fits(size: int, wanted: int, what: str) -> None:
    if size != wanted:
        raise ConfigError(f"a 4-bit weight: {what} has {size} elements where {wanted} are needed")
