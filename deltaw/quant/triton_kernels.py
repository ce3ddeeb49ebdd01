"""The kernels on a GPU, in Triton: reading, packing and multiplying weights in four bits.

What codes stand for is given to a kernel as a table, so that all codebooks share it; tables are looked up with
``tl.gather``, which leaves values in the registers where they are, unlike a load at scattered addresses. Each operation
is rounded once, in the order of the reference: kernels are launched with ``enable_fp_fusion=False``, or the compiler
would contract the product and the sum of a scale into one. Offsets are in 64 bits where they may pass 2^31.

Knows nothing of :class:`Packed`, of devices or of how many programs to start.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = [
    "DTYPES",
    "dequantize_4bit",
    "dequantize_8bit",
    "linear_4bit",
    "quantize_4bit",
    "quantize_8bit",
]

#: in which a weight can be read
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _scales(absmax, at, mask, map8, nested_absmax, nested_offset, NESTED_BLOCKSIZE: tl.constexpr):
    """The scales of blocks ``at``: a number each, or a code of the 8-bit map times its own scale, plus the mean."""
    if NESTED_BLOCKSIZE == 0:
        scale = tl.load(absmax + at, mask=mask, other=0.0)
    else:
        code = tl.load(absmax + at, mask=mask, other=0).to(tl.int32)
        own = tl.load(nested_absmax + at // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scale = tl.load(map8 + code) * own + tl.load(nested_offset)
    return scale


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scaled(values, largest, least):
    """float32 [blocks, elements] times the reciprocals of the largest magnitudes [blocks], flat; one below ``least`` is
    replaced by it, since its reciprocal would not be finite."""
    scaled = values * tl.div_rn(1.0, _larger(largest, tl.cast(least, tl.float32)))[:, None]
    return tl.reshape(scaled, (values.shape[0] * values.shape[1],))


@triton.jit
def _rank(values, thresholds, BITS: tl.constexpr):
    """How many of the 2^BITS - 1 rising thresholds [2^BITS], whose last is not read, lie below each value [n]."""
    below = tl.zeros(values.shape, tl.int32)
    for i in tl.static_range(BITS):
        # "not at most" rather than "above": a NaN takes the last code, as in the reference
        at_most = values <= tl.gather(thresholds, below + ((1 << (BITS - 1 - i)) - 1), 0)
        below += tl.where(at_most, 0, 1 << (BITS - 1 - i))
    return below


@triton.jit
def dequantize_4bit(
    codes,
    absmax,
    map8,
    nested_absmax,
    nested_offset,
    table,  # float32 [16]
    out,
    n,
    nbytes,  # of codes: a mask that is seen to be a multiple of 16 keeps the loads wide
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,  # 0 unless double quantized
    TILE: tl.constexpr,  # elements a program
):
    SHARE: tl.constexpr = min(BLOCKSIZE, TILE)  # elements of the tile that have one scale
    first = tl.program_id(0).to(tl.int64) * TILE
    share = tl.arange(0, TILE // SHARE) * SHARE
    scale = _scales(
        absmax, (first + share) // BLOCKSIZE, share < n - first, map8, nested_absmax, nested_offset, NESTED_BLOCKSIZE
    )
    byte = tl.arange(0, TILE // 2)
    pair = tl.load(codes + first // 2 + byte, mask=byte < nbytes - first // 2, other=0).to(tl.int32)
    code = tl.reshape(tl.join(pair >> 4, pair & 15), (TILE,))
    value = tl.reshape(tl.gather(tl.load(table + tl.arange(0, 16)), code, 0), (TILE // SHARE, SHARE)) * scale[:, None]
    at = tl.arange(0, TILE)
    tl.store(out + first + at, tl.reshape(value, (TILE,)).to(out.dtype.element_ty), mask=at < n - first)


@triton.jit
def quantize_4bit(
    weight,
    codes,
    absmax,
    thresholds,  # float32 [16], the last a filling
    order,  # uint8 [16], rank -> code
    n,
    nbytes,
    least,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,  # a program
):
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCKSIZE)
    block = tl.arange(0, BLOCKS) * BLOCKSIZE
    at = block[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    values = tl.load(weight + first + at, mask=at < n - first, other=0.0).to(tl.float32)
    largest = tl.reduce(tl.abs(values), 1, _larger)
    tl.store(absmax + (first + block) // BLOCKSIZE, largest, mask=block < n - first)
    sixteen = tl.arange(0, 16)
    rank = _rank(_scaled(values, largest, least), tl.load(thresholds + sixteen), 4)
    code = tl.gather(tl.load(order + sixteen).to(tl.int32), rank, 0)
    even, odd = tl.split(tl.reshape(code, (BLOCKS * BLOCKSIZE // 2, 2)))
    byte = tl.arange(0, BLOCKS * BLOCKSIZE // 2)
    tl.store(codes + first // 2 + byte, ((even << 4) | odd).to(tl.uint8), mask=byte < nbytes - first // 2)


@triton.jit
def quantize_8bit(
    values,
    codes,
    absmax,
    thresholds,  # float32 [256], the last a filling
    n,
    least,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCKSIZE)
    block = tl.arange(0, BLOCKS) * BLOCKSIZE
    at = block[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    value = tl.load(values + first + at, mask=at < n - first, other=0.0)
    largest = tl.reduce(tl.abs(value), 1, _larger)
    tl.store(absmax + (first + block) // BLOCKSIZE, largest, mask=block < n - first)
    rank = _rank(_scaled(value, largest, least), tl.load(thresholds + tl.arange(0, 256)), 8)
    flat = tl.arange(0, BLOCKS * BLOCKSIZE)
    tl.store(codes + first + flat, rank.to(tl.uint8), mask=flat < n - first)


@triton.jit
def dequantize_8bit(codes, absmax, map8, out, n, BLOCKSIZE: tl.constexpr, TILE: tl.constexpr):
    SHARE: tl.constexpr = min(BLOCKSIZE, TILE)
    first = tl.program_id(0).to(tl.int64) * TILE
    share = tl.arange(0, TILE // SHARE) * SHARE
    scale = tl.load(absmax + (first + share) // BLOCKSIZE, mask=share < n - first, other=0.0)
    at = tl.arange(0, TILE)
    code = tl.load(codes + first + at, mask=at < n - first, other=0).to(tl.int32)
    value = tl.reshape(tl.gather(tl.load(map8 + tl.arange(0, 256)), code, 0), (TILE // SHARE, SHARE)) * scale[:, None]
    tl.store(out + first + at, tl.reshape(value, (TILE,)), mask=at < n - first)


@triton.jit
def linear_4bit(
    x,  # [rows, IN]
    codes,
    absmax,
    map8,
    nested_absmax,
    nested_offset,
    table,
    out,  # [pieces, rows, OUT]
    rows,
    OUT,
    IN,
    piece,  # inputs that one program sums over, a multiple of TILE_IN
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    STORED: tl.constexpr,  # dtype in which the weight is read
    SPLIT: tl.constexpr,  # x is float32 and the weight bfloat16: exact products from the tensor cores, in three parts
    PRECISION: tl.constexpr,  # of products in float32
    SHARE: tl.constexpr,  # so many inputs, from a multiple of it on, have one scale in every row; 1 where IN is odd
    FULL: tl.constexpr,  # whether IN is a multiple of TILE_IN
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    o = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    r = tl.program_id(2) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    begin = tl.program_id(1) * piece
    row = o[:, None].to(tl.int64) * IN  # where each row starts in the flat weight
    values = tl.load(table + tl.arange(0, 16))
    total = tl.zeros((TILE_OUT, TILE_ROWS), tl.float32)
    for k in range(begin, tl.minimum(begin + piece, IN), TILE_IN):
        column = k + tl.arange(0, TILE_IN)
        share = k + tl.arange(0, TILE_IN // SHARE) * SHARE
        x_there = r[:, None] < rows
        w_there = o[:, None] < OUT
        s_there = w_there
        if not FULL:
            x_there = x_there & (column[None, :] < IN)
            s_there = s_there & (share[None, :] < IN)
        if SHARE > 1:
            pair = tl.arange(0, TILE_IN // 2)
            if not FULL:
                w_there = w_there & (k + pair[None, :] * 2 < IN)
            both = tl.load(codes + (row + k) // 2 + pair[None, :], mask=w_there, other=0).to(tl.int32)
            code = tl.reshape(tl.join(both >> 4, both & 15), (TILE_OUT, TILE_IN))
        else:  # a row may begin inside a byte
            at = row + column[None, :]
            both = tl.load(codes + at // 2, mask=s_there, other=0).to(tl.int32)
            code = tl.where(at % 2 == 0, both >> 4, both & 15)
        scale = _scales(
            absmax, (row + share[None, :]) // BLOCKSIZE, s_there, map8, nested_absmax, nested_offset, NESTED_BLOCKSIZE
        )
        scale = tl.broadcast_to(scale[:, :, None], (TILE_OUT, TILE_IN // SHARE, SHARE))
        value = tl.reshape(tl.gather(values, tl.reshape(code, (TILE_OUT * TILE_IN,)), 0), (TILE_OUT, TILE_IN))
        weight = (value * tl.reshape(scale, (TILE_OUT, TILE_IN))).to(STORED)
        fed = tl.load(x + r[:, None].to(tl.int64) * IN + column[None, :], mask=x_there, other=0.0)
        if SPLIT:
            high = fed.to(tl.bfloat16)
            rest = fed - high.to(tl.float32)
            rest = tl.where(rest == rest, rest, 0.0)  # infinity has no rest
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(weight, tl.trans(low), total)
            total = tl.dot(weight, tl.trans(middle), total)
            total = tl.dot(weight, tl.trans(high), total)
        else:
            total = tl.dot(weight.to(fed.dtype), tl.trans(fed), total, input_precision=PRECISION)
    at_out = (tl.program_id(1) * rows + r[None, :]).to(tl.int64) * OUT + o[:, None]
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=(o[:, None] < OUT) & (r[None, :] < rows))
