"""The operations on weights in four bits, each declared once: a schema, what it returns in shape (for the compiler),
and the backend that runs it. Plain calls go to the backend directly; a compiled graph holds ``torch.ops.deltaw``.

Knows nothing of modules.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deltaw.errors import ConfigError
from deltaw.quant.backends import backend_for
from deltaw.quant.packed import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES, READ_AS, Packed

__all__ = ["dequantize_4bit", "dequantize_8bit", "linear_4bit", "quantize_4bit", "quantize_8bit"]

_library = torch.library.Library("deltaw", "DEF")
_PACKED = (
    "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, str quant_type, int blocksize, "
    "SymInt[] shape, ScalarType dtype, int nested_blocksize"
)
_library.define("quantize_4bit(Tensor weight, str quant_type, int blocksize) -> (Tensor, Tensor)")
_library.define(f"dequantize_4bit({_PACKED}) -> Tensor")
_library.define(f"linear_4bit(Tensor x, {_PACKED}) -> Tensor")
_library.define("quantize_8bit(Tensor values, bool signed, int blocksize) -> (Tensor, Tensor)")
_library.define("dequantize_8bit(Tensor codes, Tensor absmax, bool signed, int blocksize) -> Tensor")


# --- for everyone -------------------------------------------------------------------------------------------


def quantize_4bit(
    weight: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    *,
    nested: bool = False,
    dtype: torch.dtype | None = None,
) -> Packed:
    """A weight in four bits, in the layout of bitsandbytes.

    Args:
        weight: any shape, floating dtype.
        quant_type: ``"nf4"`` (QLoRA, arXiv 2305.14314, section 3) or ``"fp4"``.
        blocksize: elements that share one absmax; a power of two from 32 to 4096.
        nested: quantize the absmax values too ("double quantization"): 4.127 bits an element instead of 4.5.
        dtype: in which it is read back; None: that of ``weight``.

    Raises:
        ConfigError: a type, blocksize or dtype that there is not.
    """
    _check(quant_type, blocksize, dtype or weight.dtype)
    weight = weight.detach().contiguous()
    codes, absmax = _quantize_4bit(weight, quant_type, blocksize)
    nested_absmax = offset = None
    if nested:
        offset = absmax.mean()[None] if absmax.numel() else absmax.new_zeros(1)
        absmax, nested_absmax = quantize_8bit(absmax - offset, signed=True, blocksize=NESTED_BLOCKSIZE)
    return Packed(codes, absmax, nested_absmax, offset, quant_type, blocksize, weight.shape, dtype or weight.dtype)


def dequantize_4bit(packed: Packed, *, out: Tensor | None = None) -> Tensor:
    """The weight, in ``packed.dtype``: code * scale in float32, rounded once to nearest even; the same bits on every
    device and backend.

    Args:
        out: contiguous, of ``packed.shape`` and ``packed.dtype``: written over and returned.
    """
    if torch.compiler.is_compiling():
        if not torch.is_grad_enabled():
            return _read(*_fields(packed))
        # the compiler reads it again in backward; of its own accord it would keep the dense weight until then
        return checkpoint(_read, *_fields(packed), use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
    if out is None:
        out = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    backend_for(packed.device).dequantize_4bit(packed, out)
    return out


def linear_4bit(x: Tensor, packed: Packed) -> Tensor:
    """x (..., in) W^T -> (..., out), for the few rows of generation: the weight is read in four bits and never written
    out. Has no gradient."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        out = torch.ops.deltaw.linear_4bit(rows, *_fields(packed))
    else:
        out = backend_for(packed.device).linear_4bit(rows, packed)
    return out.view(*x.shape[:-1], packed.shape[0])


def quantize_8bit(values: Tensor, *, signed: bool, blocksize: int = 256) -> tuple[Tensor, Tensor]:
    """float32 [n] -> (codes uint8 [n], absmax float32 [ceil(n / blocksize)]), with the dynamic map (Dettmers et al.
    2022, arXiv 2110.02861), signed or for values that are never negative."""
    values = values.detach().contiguous()
    if torch.compiler.is_compiling():
        return torch.ops.deltaw.quantize_8bit(values, signed, blocksize)
    return backend_for(values.device).quantize_8bit(values, signed, blocksize)


def dequantize_8bit(
    codes: Tensor, absmax: Tensor, *, signed: bool, blocksize: int = 256, out: Tensor | None = None
) -> Tensor:
    """What :func:`quantize_8bit` packed, float32 [n]; over ``out`` where it is given."""
    if torch.compiler.is_compiling():
        return torch.ops.deltaw.dequantize_8bit(codes, absmax, signed, blocksize)
    if out is None:
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    backend_for(codes.device).dequantize_8bit(codes, absmax, signed, blocksize, out)
    return out


def _check(quant_type: str, blocksize: int, dtype: torch.dtype) -> None:
    given = {"quant_type": (quant_type, QUANT_TYPES), "blocksize": (blocksize, BLOCKSIZES), "dtype": (dtype, READ_AS)}
    faults = [f"{name}={value!r}: it is one of {known}" for name, (value, known) in given.items() if value not in known]
    if faults:
        raise ConfigError(f"a weight cannot be quantized to 4 bits with {'; '.join(faults)}")


def _quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return torch.ops.deltaw.quantize_4bit(weight, quant_type, blocksize)
    return backend_for(weight.device).quantize_4bit(weight, quant_type, blocksize)


# --- what a compiled graph calls ----------------------------------------------------------------------------


def _read(*fields) -> Tensor:
    return torch.ops.deltaw.dequantize_4bit(*fields)


def _fields(p: Packed) -> tuple:
    return (
        p.codes,
        p.absmax,
        p.nested_absmax,
        p.nested_offset,
        p.quant_type,
        p.blocksize,
        list(p.shape),
        p.dtype,
        p.nested_blocksize,
    )


def _packed(
    codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype, nested_blocksize
) -> Packed:
    shape = torch.Size(shape)
    return Packed(codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype, nested_blocksize)


def _blocks(n, blocksize: int):
    return (n + blocksize - 1) // blocksize


_library.impl(
    "quantize_4bit",
    lambda weight, kind, size: _quantize_4bit(weight.contiguous(), kind, size),
    "CompositeExplicitAutograd",
)
_library.impl("dequantize_4bit", lambda *fields: dequantize_4bit(_packed(*fields)), "CompositeExplicitAutograd")
_library.impl("linear_4bit", lambda x, *fields: linear_4bit(x, _packed(*fields)), "CompositeExplicitAutograd")
_library.impl(
    "quantize_8bit",
    lambda values, signed, size: quantize_8bit(values, signed=signed, blocksize=size),
    "CompositeExplicitAutograd",
)
_library.impl(
    "dequantize_8bit",
    lambda codes, absmax, signed, size: dequantize_8bit(codes, absmax, signed=signed, blocksize=size),
    "CompositeExplicitAutograd",
)


@torch.library.register_fake("deltaw::quantize_4bit", lib=_library)
def _(weight, quant_type, blocksize):
    codes = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    return codes, weight.new_empty(_blocks(weight.numel(), blocksize), dtype=torch.float32)


@torch.library.register_fake("deltaw::dequantize_4bit", lib=_library)
def _(codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype, nested_blocksize):
    return codes.new_empty(shape, dtype=dtype)


@torch.library.register_fake("deltaw::linear_4bit", lib=_library)
def _(x, codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype, nested_blocksize):
    return x.new_empty(x.shape[0], shape[0])


@torch.library.register_fake("deltaw::quantize_8bit", lib=_library)
def _(values, signed, blocksize):
    codes = torch.empty_like(values, dtype=torch.uint8)
    return codes, values.new_empty(_blocks(values.numel(), blocksize), dtype=torch.float32)


@torch.library.register_fake("deltaw::dequantize_8bit", lib=_library)
def _(codes, absmax, signed, blocksize):
    return torch.empty_like(codes, dtype=torch.float32)
