"""The C kernels, on every instruction set of this machine, against the reference and bitsandbytes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import bnb
import pytest
import torch
from bits import all_same, available, same
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.adamw import adamw

from deltaw.errors import ConfigError
from deltaw.quant import native, nf4
from deltaw.quant.codebooks import dynamic_thresholds, thresholds
from deltaw.quant.packed import Packed

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(bool(native.unavailable(CPU)), reason=f"no kernels: {native.unavailable(CPU)}")


@pytest.fixture(params=native.INSTRUCTION_SETS)
def isa(request):
    """Each instruction set, one after the other."""
    before = native.instruction_set()
    try:
        native.select(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    yield request.param
    native.select(before)


def odd_numbers(n: int, seed: int) -> Tensor:
    """Normal numbers, and among them zeros of both signs, whole blocks of zeros, subnormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator)
    for value in (0.0, -0.0, 1e-38, 1e-42, 3e38, torch.inf, -torch.inf, torch.nan):
        at = int(torch.randint(0, max(n, 1), (1,), generator=generator))
        if value == value and abs(value) < 1:
            values[at : at + 64] = value
        elif seed % 2:
            values[at : at + 1] = value
    return values


def packed(weight: Tensor, quant_type="nf4", blocksize=64, *, nested=False, dtype=torch.bfloat16) -> Packed:
    """Made by the reference."""
    codes, absmax = nf4.quantize_4bit(weight.contiguous(), quant_type, blocksize)
    inner = offset = None
    if nested:
        offset = absmax.nan_to_num(1, 1, 1).mean()[None] if absmax.numel() else absmax.new_zeros(1)
        absmax, inner = nf4.quantize_8bit(absmax - offset, True, 256)
    return Packed(codes, absmax, inner, offset, quant_type, blocksize, weight.shape, dtype)


def read(backend, weight: Packed) -> Tensor:
    out = torch.full(weight.shape, 7.0, dtype=weight.dtype)
    backend.dequantize_4bit(weight, out)
    return out


# --- bits ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    n=st.integers(0, 5000),
    seed=st.integers(0, 99),
    blocksize=st.sampled_from([32, 64, 128, 256, 1024, 4096]),
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
)
@example(n=0, seed=1, blocksize=64, dtype=torch.float32, quant_type="nf4")
@example(n=1, seed=1, blocksize=64, dtype=torch.bfloat16, quant_type="fp4")
@example(n=4097, seed=1, blocksize=4096, dtype=torch.float16, quant_type="nf4")
def test_quantizes_and_dequantizes_to_the_bits_of_the_reference(n, seed, blocksize, dtype, quant_type):
    before = native.instruction_set()
    weight = odd_numbers(n, seed).to(dtype)
    expected = nf4.quantize_4bit(weight, quant_type, blocksize)
    stored = [packed(weight, quant_type, blocksize, nested=nested) for nested in (False, True)]
    dense = [(p, read(nf4, p)) for p in (replace(p, dtype=d) for p in stored for d in DTYPES)]
    for name in available():
        native.select(name)
        assert all_same(native.quantize_4bit(weight, quant_type, blocksize), expected), name
        for p, values in dense:
            assert same(read(native, p), values), (name, p.dtype, p.nested)
    native.select(before)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_tie_goes_to_the_lower_code(isa, quant_type):
    bounds = thresholds(quant_type, CPU)
    weight = torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), torch.ones(2)])  # absmax 1: divided by nothing
    codes, _ = native.quantize_4bit(weight, quant_type, 64)
    assert torch.equal(codes, nf4.quantize_4bit(weight, quant_type, 64)[0])
    nibbles = torch.stack([codes >> 4, codes & 15], 1).view(-1)
    if quant_type == "nf4":
        assert nibbles[:15].tolist() == list(range(15))
        assert nibbles[15:30].tolist() == list(range(1, 16))


@pytest.mark.parametrize(
    "scale", [1e-45, 1e-40, 1.2e-38, 1e-36, 3e-5, 7e4, 3e38, torch.inf, torch.nan, 0.0, -0.0, -1.5]
)
def test_scales_at_the_ends_of_a_float(isa, scale):
    """Values that are subnormal in what they are read as, too large for it, or no numbers."""
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(16) * 16 + torch.arange(16, dtype=torch.uint8).repeat(
        16
    )
    for dtype in DTYPES:
        weight = Packed(codes, torch.full((8,), scale), None, None, "nf4", 64, torch.Size([512]), dtype)
        assert same(read(native, weight), read(nf4, weight)), dtype


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_those_of_the_reference(isa, signed):
    bounds = dynamic_thresholds(signed, CPU)
    sizes = torch.logspace(-9, 3, 10_007)
    values = [torch.cat([bounds, torch.ones(1)]), odd_numbers(10_007, 1), odd_numbers(10_007, 2) * sizes, torch.ones(0)]
    for given_ in values:
        given_ = given_ if signed else given_.abs()
        codes, absmax = native.quantize_8bit(given_, signed, 256)
        assert all_same((codes, absmax), nf4.quantize_8bit(given_, signed, 256))
        ours, theirs = torch.empty_like(given_), torch.empty_like(given_)
        native.dequantize_8bit(codes, absmax, signed, 256, ours)
        nf4.dequantize_8bit(codes, absmax, signed, 256, theirs)
        assert same(ours, theirs)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_packs_and_reads_the_same(isa, quant_type, dtype):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    codes, state = bnb.quantize(weight, quant_type)
    ours = native.quantize_4bit(weight, quant_type, 64)
    assert torch.equal(ours[0], codes.view(-1))
    assert torch.equal(ours[1], state.absmax)
    mine = Packed(*ours, None, None, quant_type, 64, weight.shape, dtype)
    assert torch.equal(read(native, mine), bnb.dequantize(codes, state))


def test_views_that_begin_anywhere(isa):
    bytes_ = torch.randint(0, 256, (2000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = odd_numbers(3000, 4)
    for offset in (1, 3, 7):
        weight = Packed(bytes_[offset : offset + 500], floats[offset : offset + 16].abs(), None, None, "nf4", 64,
                        torch.Size([1000]), torch.bfloat16)  # fmt: skip
        aligned = weight.clone()
        assert same(read(native, weight), read(nf4, aligned))
        for dtype in DTYPES:
            part = floats.to(dtype)[offset : offset + 777]
            assert all_same(native.quantize_4bit(part, "nf4", 64), nf4.quantize_4bit(part.clone(), "nf4", 64))
            out = torch.zeros(1200, dtype=dtype)
            native.dequantize_4bit(replace(weight, dtype=dtype), out[offset : offset + 1000])
            assert same(out[offset : offset + 1000], read(nf4, replace(aligned, dtype=dtype)))
            assert not out[:offset].any()
            assert not out[offset + 1000 :].any()


# --- products -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 64), (5, 96), (9, 33), (3, 1), (64, 576), (2, 4100), (0, 64), (4, 0)], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_few_rows_times_the_bytes(isa, shape, nested):
    generator = torch.Generator().manual_seed(0)
    kinds = itertools.product(DTYPES, DTYPES, [0, 1, 2, 3, 4, 7, 8, 13])
    weight = torch.randn(shape, generator=generator)
    for kind, read_as, rows in kinds:
        stored = packed(weight, nested=nested, dtype=read_as)
        x = torch.randn(rows, shape[1], generator=generator).to(kind)
        dense = read(nf4, stored).double()
        exact, size = x.double() @ dense.T, x.double().abs() @ dense.abs().T
        # float32 takes two ways: numbers that bfloat16 holds, and those that it does not
        for given_ in (x, x.bfloat16().float()) if kind == torch.float32 else (x,):
            if given_ is not x:
                exact, size = given_.double() @ dense.T, given_.double().abs() @ dense.abs().T
            y = native.linear_4bit(given_, stored)
            assert y.dtype == kind
            assert y.shape == (rows, shape[0])
            step = {torch.float32: 1e-7, torch.bfloat16: 2**-8, torch.float16: 2**-10}[kind]
            assert ((y.double() - exact).abs() <= step * exact.abs() + 1e-6 * size + 1e-7).all(), (kind, read_as, rows)


def test_the_product_does_not_depend_on_threads(isa):
    weight = packed(torch.randn(700, 608), nested=True)  # enough for two threads and more
    x = torch.randn(2, 608)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append((native.linear_4bit(x, weight), read(native, weight)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][1], read(nf4, weight))


# --- AdamW --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grads_in", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs_own_between_reading_and_packing(isa, grads_in):
    """On whole vectors bit for bit; torch's kernel rounds the rest of an array in another way."""
    n, generator = 16 * 256, torch.Generator().manual_seed(0)
    values = torch.randn(n, generator=generator)
    state = [
        torch.full((n,), 127, dtype=torch.uint8),
        torch.zeros(16),
        torch.zeros(n, dtype=torch.uint8),
        torch.zeros(16),
    ]
    twin, kept = values.clone(), [tensor.clone() for tensor in state]
    rates = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    for step in range(1, 8):
        grads = (torch.randn(n, generator=generator) * 10.0 ** -(step % 5)).to(grads_in)
        native.adamw_8bit(values, grads, *state, **rates, step=step)
        m, v = torch.empty(n), torch.empty(n)
        nf4.dequantize_8bit(kept[0], kept[1], True, 256, m)
        nf4.dequantize_8bit(kept[2], kept[3], False, 256, v)
        count = torch.tensor(float(step - 1))
        adamw(
            [twin],
            [grads.float()],
            [m],
            [v],
            [],
            [count],
            fused=True,
            foreach=False,
            amsgrad=False,
            maximize=False,
            **rates,
        )
        kept = [*nf4.quantize_8bit(m, True, 256), *nf4.quantize_8bit(v, False, 256)]
        torch.testing.assert_close(values, twin, rtol=2e-7, atol=1e-9)
        assert all_same(tuple(state), tuple(kept)), step
    assert not torch.equal(values, torch.randn(n, generator=torch.Generator().manual_seed(0)))


def test_adamw_of_any_size(isa):
    for n in (0, 1, 255, 257, 1000):
        blocks = -(-n // 256)
        values, grads = torch.ones(n), torch.tensor([-0.5, 2.0]).repeat(n)[:n]
        state = torch.full((n,), 127, dtype=torch.uint8), torch.zeros(blocks), torch.zeros(n, dtype=torch.uint8)
        rates = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
        native.adamw_8bit(values, grads, *state, torch.zeros(blocks), **rates)
        torch.testing.assert_close(values, 1 - 0.1 * grads.sign(), atol=1e-4, rtol=0)  # the first step has unit size


def test_adamw_refuses_what_it_would_misread():
    n = 512
    good = [torch.zeros(n), torch.zeros(n), *(torch.zeros(size, dtype=dtype) for size, dtype in
            [(n, torch.uint8), (2, torch.float32)] * 2)]  # fmt: skip
    rates = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    native.adamw_8bit(*good, **rates)
    for at, wrong in [(0, torch.zeros(n).bfloat16()), (1, torch.zeros(n - 1)), (3, torch.zeros(1)), (2, torch.zeros(n)),
                      (1, torch.zeros(2 * n)[::2]), (1, torch.zeros(n, dtype=torch.int32))]:  # fmt: skip
        with pytest.raises(ConfigError, match="adamw_8bit"):
            native.adamw_8bit(*good[:at], wrong, *good[at + 1 :], **rates)


# --- sizes --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    """The library trusts the sizes: reading past the end would crash at best."""
    good = packed(torch.randn(8, 64), nested=True)
    x = torch.randn(1, 64)
    for field in ("codes", "absmax", "nested_absmax"):
        short = replace(good, **{field: getattr(good, field)[:-1]})
        with pytest.raises(ConfigError, match=field):
            native.linear_4bit(x, short)
        with pytest.raises(ConfigError, match=field):
            read(native, short)
    with pytest.raises(ConfigError, match="absmax"):
        read(native, replace(packed(torch.randn(8, 64)), absmax=torch.zeros(8, dtype=torch.float64)))
    with pytest.raises(ConfigError, match="gaps"):
        read(native, replace(good, codes=torch.zeros(512, dtype=torch.uint8)[::2]))
    with pytest.raises(ConfigError, match="a row of x"):
        native.linear_4bit(torch.randn(1, 63), good)
    with pytest.raises(ConfigError, match="the output"):
        native.dequantize_4bit(good, torch.empty(8, 63))
    with pytest.raises(ConfigError, match="absmax"):
        native.dequantize_8bit(torch.zeros(257, dtype=torch.uint8), torch.zeros(1), True, 256, torch.empty(257))


def test_other_dtypes_and_outputs_with_gaps(isa):
    weight = torch.randn(6, 70, dtype=torch.float64)
    assert all_same(native.quantize_4bit(weight, "nf4", 64), nf4.quantize_4bit(weight.float(), "nf4", 64))
    stored = packed(weight, dtype=torch.float64)
    out = torch.empty(6, 140, dtype=torch.float64)[:, ::2]
    native.dequantize_4bit(stored, out)
    assert torch.equal(out, read(nf4, replace(stored, dtype=torch.float32)).double())
    x = torch.randn(70, 2, dtype=torch.float64).T
    torch.testing.assert_close(native.linear_4bit(x, stored), x @ out.T, rtol=1e-5, atol=1e-5)


def memory_left() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Zeros that nobody wrote to share one page, so that only what is written takes memory: 4.5 GB at most."""
    if memory_left() < 8 << 30:
        pytest.skip("less than 8 GB of memory are left")
    rows, columns = (1 << 16) + 1, (1 << 15) + 32
    n = rows * columns
    assert n > 1 << 31
    weight = torch.zeros(n, dtype=torch.bfloat16)
    weight[-100:] = torch.linspace(-1, 1, 100)
    codes, absmax = native.quantize_4bit(weight, "nf4", 64)
    tail = n % 64 + 64  # the last blocks, by themselves
    assert all_same((codes[-tail // 2 :], absmax[-2:]), nf4.quantize_4bit(weight[-tail:], "nf4", 64))
    assert (codes[: 1 << 20] == 0x77).all()
    assert absmax[:-3].amax() == 0
    stored = Packed(codes, absmax, None, None, "nf4", 64, torch.Size([rows, columns]), torch.bfloat16)
    y = native.linear_4bit(torch.ones(1, columns), stored)
    del weight
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    native.dequantize_4bit(stored, out)
    last = out.view(-1)[-tail:]
    assert same(last, read(nf4, replace(stored, codes=codes[-tail // 2 :], absmax=absmax[-2:], shape=last.shape)))
    assert out[0].any().item() is False
    torch.testing.assert_close(y[0, -1], out[-1].float().sum(), rtol=1e-4, atol=1e-4)
    assert not y[0, :-1].any()
