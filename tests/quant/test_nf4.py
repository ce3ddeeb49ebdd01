"""The reference: against the paper's formulas and, bit for bit, against bitsandbytes on a CPU."""

import dataclasses
import itertools

import bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.quant import nf4
from deltaw.quant.codebooks import codebook, dynamic_map
from deltaw.quant.packed import BLOCKSIZES, NESTED_BLOCKSIZE, Packed

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TYPES = ["nf4", "fp4"]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pack(weight: Tensor, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False) -> Packed:
    """As ``deltaw.quant.ops.quantize_4bit``, with the reference alone."""
    codes, absmax = nf4.quantize_4bit(weight, quant_type, blocksize)
    inner = offset = None
    if nested:
        offset = absmax.mean()[None]
        absmax, inner = nf4.quantize_8bit(absmax - offset, True, NESTED_BLOCKSIZE)
    return Packed(codes, absmax, inner, offset, quant_type, blocksize, weight.shape, weight.dtype)


def unpack(packed: Packed) -> Tensor:
    out = torch.full(packed.shape, float("nan"), dtype=packed.dtype)
    nf4.dequantize_4bit(packed, out)
    return out


def plain(weight: Tensor, quant_type: str, blocksize: int) -> tuple[list[int], list[float]]:
    """The paper's formula, one value after the other, in float32: (code of each element, absmax of each block)."""
    values = [np.float32(v) for v in weight.float().flatten().tolist()]
    book = [np.float32(v) for v in codebook(quant_type, CPU).tolist()]
    codes, absmax = [], []
    for start in range(0, len(values), blocksize):
        block = values[start : start + blocksize]
        largest = max(abs(v) for v in block)
        inverse = np.float32(1) / max(largest, np.float32(1e-38))
        absmax.append(float(largest))
        ascending = sorted(range(16), key=lambda c: (book[c], c))
        for v in block:
            scaled = v * inverse
            place = sum(bool(scaled > (book[a] + book[b]) / np.float32(2)) for a, b in itertools.pairwise(ascending))
            codes.append(ascending[place])
    return codes, absmax


# --- the layout ---------------------------------------------------------------------------------------------


def test_the_even_element_is_in_the_high_nibble():
    codes, absmax = nf4.quantize_4bit(torch.tensor([-1.0, 1.0, 0.0]), "nf4", 64)
    assert codes.tolist() == [0x0F, 0x77]  # the last low nibble holds the code of zero
    assert absmax.tolist() == [1.0]
    assert nf4.quantize_4bit(torch.tensor([1.0, -1.0, 0.0]), "fp4", 64)[0].tolist() == [0x3B, 0x00]


@pytest.mark.parametrize("quant_type", TYPES)
@given(n=st.integers(0, 300), blocksize=st.sampled_from([32, 64, 128]), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_it_is_the_formula(quant_type, n, blocksize, seed):
    weight = draw(n, seed=seed)
    packed = pack(weight, quant_type, blocksize)
    codes, absmax = plain(weight, quant_type, blocksize)
    nibbles = [c for byte in packed.codes.tolist() for c in (byte >> 4, byte & 15)][:n]
    assert nibbles == codes
    assert packed.absmax.tolist() == absmax
    expected = [codebook(quant_type, CPU)[c] * packed.absmax[i // blocksize] for i, c in enumerate(codes)]
    assert unpack(packed).tolist() == [v.item() for v in expected]


def test_a_tie_goes_to_the_lower_code():
    book = codebook("nf4", CPU)
    ties = (book[:-1] + book[1:]) / 2
    weight = torch.cat([ties, torch.ones(1)])
    codes, _ = nf4.quantize_4bit(weight, "nf4", 64)
    nibbles = torch.stack([codes >> 4, codes & 15], 1).flatten()[:15]
    assert nibbles.tolist() == list(range(15))


def test_a_block_may_straddle_rows():
    weight = draw(5, 48)
    assert torch.equal(pack(weight).codes, pack(weight.view(-1)).codes)
    assert pack(weight).absmax.shape == (4,)


# --- bitsandbytes -------------------------------------------------------------------------------------------

#: whole blocks in every row, blocks that straddle rows, an incomplete last block, odd rows, one element
SHAPES = [(64, 128), (30, 96), (8, 40), (7, 33), (1, 1), (3, 64), (128, 1024)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_bitsandbytes(dtype, quant_type, shape):
    weight = draw(*shape, dtype=dtype)
    ours = pack(weight, quant_type)
    codes, state = bnb.quantize(weight, quant_type)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.codes, codes.view(-1))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", TYPES)
def test_every_blocksize_is_bitsandbytes(blocksize, quant_type):
    weight = draw(4, 4096)
    ours = pack(weight, quant_type, blocksize)
    codes, state = bnb.quantize(weight, quant_type, blocksize)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.codes, codes.view(-1))
    assert torch.equal(unpack(ours), bnb.dequantize(codes, state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("shape", [(64, 128), (7, 33), (1, 1), (3, 64), (128, 1024), (5, 63)])
def test_dequantized_bits_are_bitsandbytes(dtype, quant_type, shape, nested):
    packed = pack(draw(*shape, dtype=dtype), quant_type, nested=nested)
    assert torch.equal(unpack(packed), bnb.dequantize(*bnb.state_of(packed)))


def test_a_row_that_the_blocks_do_not_divide_is_read_right():
    """bitsandbytes' CPU kernel takes the wrong absmax here; flat, where rows play no role, it agrees."""
    packed = pack(draw(30, 96))
    codes, state = bnb.state_of(packed)
    state.shape = torch.Size([30 * 96])
    assert torch.equal(unpack(packed).flatten(), bnb.dequantize(codes, state).flatten())


@pytest.mark.parametrize("shape", [(64, 128), (128, 1024), (30, 96)])
def test_nested_statistics_are_bitsandbytes(shape):
    ours = pack(draw(*shape), nested=True)
    _, state = bnb.quantize(draw(*shape), nested=True)
    assert ours.nested_absmax is not None
    assert ours.nested_offset is not None
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.nested_offset[0], state.offset)
    # its CPU kernel looks codes up in a table of equal steps, so a few are not the nearest; ours all are
    absmax = pack(draw(*shape)).absmax - ours.nested_offset
    scale = ours.nested_absmax.repeat_interleave(256)[: len(absmax)]
    book = dynamic_map(True, CPU)
    off = [(absmax - book[codes.long()] * scale).abs() for codes in (ours.absmax, state.absmax)]
    assert (off[0] <= off[1] + 1e-6 * scale).all()
    assert (ours.absmax != state.absmax).float().mean() < 0.01
    assert (ours.absmax.int() - state.absmax.int()).abs().max() <= 1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 255, 256, 1000])
def test_eight_bits_take_the_nearest_value(signed, n):
    values = draw(n) if signed else draw(n).square()
    codes, absmax = nf4.quantize_8bit(values, signed, 256)
    scale = absmax.repeat_interleave(256)[:n]
    nearest = ((values / scale)[:, None] - dynamic_map(signed, CPU)).abs().amin(1)
    out = torch.empty(n)
    nf4.dequantize_8bit(codes, absmax, signed, 256, out)
    assert torch.equal(out, dynamic_map(signed, CPU)[codes.long()] * scale)
    assert torch.allclose((out - values).abs() / scale, nearest, atol=1e-6)
    theirs = bnb.functional.dequantize_blockwise(
        codes, absmax=absmax, code=bnb.functional.create_dynamic_map(signed), blocksize=256
    )
    assert torch.equal(out, theirs)


# --- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", TYPES)
def test_zeros_stay_zeros(quant_type, nested):
    weight = draw(4, 64)
    weight[1] = 0
    back = unpack(pack(weight, quant_type))
    assert (back[1] == 0).all()
    assert not back[1].signbit().any()
    assert torch.isfinite(back).all()
    assert (unpack(pack(torch.zeros(4, 65), quant_type, nested=nested)) == 0).all()


def test_values_too_small_to_be_inverted_are_read_as_finite():
    weight = torch.full((64,), 1e-44)
    back = unpack(pack(weight))
    assert torch.isfinite(back).all()
    assert back.abs().max() <= 1e-44


@pytest.mark.parametrize("quant_type", TYPES)
def test_what_is_not_finite_stays_in_its_block(quant_type):
    weight = draw(3, 64)
    weight[1, 5] = float("nan")
    back = unpack(pack(weight, quant_type))
    assert back[1].isnan().any()
    assert torch.equal(back[[0, 2]], unpack(pack(weight[[0, 2]], quant_type)))


@pytest.mark.parametrize("nested", [False, True])
def test_nothing_is_quantized_to_nothing(nested):
    codes, absmax = nf4.quantize_4bit(torch.empty(0, 8), "nf4", 64)
    assert (codes.shape, absmax.shape) == ((0,), (0,))
    empty = Packed(codes, absmax, None, None, "nf4", 64, torch.Size((0, 8)), torch.float32)
    assert unpack(empty).shape == (0, 8)
    assert nf4.linear_4bit(torch.ones(2, 8), empty).shape == (2, 0)
    assert nf4.quantize_8bit(torch.empty(0), True, 256)[0].shape == (0,)


def test_quantizing_again_gives_the_same_bytes():
    """Without double quantization: the largest value of a block is kept, so its scale is."""
    weight = draw(16, 64)
    once = pack(weight)
    again = pack(unpack(once))
    assert torch.equal(once.absmax, again.absmax)
    assert torch.equal(once.codes, again.codes)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [256, 512, 4096])
def test_parts_are_as_the_whole(monkeypatch, nested, size):
    """Work goes in parts so that memory stays small; where they are cut does not show."""
    weight = draw(37, 111)
    whole = pack(weight, nested=nested)
    expected, product = unpack(whole), nf4.linear_4bit(draw(3, 111, seed=1), whole)
    monkeypatch.setattr(nf4, "CHUNK", size)
    parts = pack(weight, nested=nested)
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, parts.tensors()[name]), name
    assert torch.equal(unpack(whole), expected)
    assert torch.allclose(nf4.linear_4bit(draw(3, 111, seed=1), whole), product, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 64), (10, 33), (1, 7)])
def test_a_product_is_that_of_the_weight(dtype, shape):
    packed = pack(draw(*shape, dtype=dtype), nested=True)
    x = draw(3, shape[1], dtype=dtype, seed=1)
    expected = x.double() @ unpack(packed).double().T
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    out = nf4.linear_4bit(x, packed)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_it_needs_little_memory_beside_what_it_reads_and_writes():
    """The parts of 2^20 elements, whatever the size of the weight."""
    weight = torch.zeros(1, dtype=torch.bfloat16).expand(1 << 24)
    largest = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = out if isinstance(out, (tuple, list)) else [out]
            largest = max([largest, *(t.nbytes for t in tensors if isinstance(t, Tensor) and t.is_contiguous())])
            return out

    with Count():
        codes, absmax = nf4.quantize_4bit(weight, "nf4", 64)
    assert largest <= max(codes.nbytes, 8 * nf4.CHUNK)
    packed = Packed(codes, absmax, None, None, "nf4", 64, weight.shape, torch.bfloat16)
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    largest = 0
    with Count():
        nf4.dequantize_4bit(packed, out)
    assert largest <= max(out.nbytes, 8 * nf4.CHUNK)


@pytest.mark.parametrize("nested", [False, True])
def test_offsets_beyond_two_to_the_31(tmp_path, nested):
    """The end of a weight of more elements than an int32 counts; the gigabyte before it is a hole in a file."""
    start, end = 2**31, pack(draw(2**18 + 130), nested=nested)
    n = start + end.numel()
    codes = torch.from_file(str(tmp_path / "codes"), shared=True, size=n // 2, dtype=torch.uint8)
    codes[start // 2 :] = end.codes
    held = {"codes": codes}
    for name, per_value in {"absmax": 64, "nested_absmax": 64 * 256}.items():
        own = getattr(end, name)
        if own is not None:
            held[name] = torch.cat([torch.zeros(start // per_value, dtype=own.dtype), own])
    huge = dataclasses.replace(end, **held, shape=torch.Size((n,)))
    expected = unpack(end)
    for first in (0, 2**17, 2**18, 2**18 + 7):
        part = nf4._values(huge, slice(start + first, n))
        assert torch.equal(part, expected[first:]), first


def test_it_runs_everywhere():
    assert nf4.unavailable(CPU) == ""
    assert pack(torch.empty(8, 8, device="meta")).codes.is_meta
