"""Runs the Triton kernels on the CPU, through Triton's interpreter, and compares them with the reference.

A script of its own, since triton decides at its import whether it interprets. Reads cases as a JSON list from standard
input, writes what is wrong with each (empty: nothing) as a line of JSON. Started by test_triton.py.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import math
import mmap
import sys
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from deltaw.quant import nf4, triton
from deltaw.quant.packed import Packed

torch.set_num_threads(1)
np.seterr(all="ignore")  # NaN and infinity are among the cases
SIZES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.uint8: torch.uint8}


# --- what the interpreter does otherwise than a GPU ------------------------------------------------------------


def cast(self, src, dst_type):
    """It cuts bfloat16 off, where cvt.rn.bf16.f32 rounds to nearest even, and widens its subnormals wrongly."""
    if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
        bits = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, tl.bfloat16)
    return otherwise(self, widened(src) if dst_type.scalar is tl.float32 else src, dst_type)


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """It multiplies the bits of bfloat16 as if they were integers."""
    return product(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)


def widened(handle):
    if handle.dtype.scalar is not tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def with_bounds(tensor, scope):
    """Its scalars are arrays of one element, which numpy no longer takes as the bounds of a loop."""
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


patch, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, with_bounds
otherwise, product = interpreter.InterpreterBuilder.cast_impl, interpreter.InterpreterBuilder.create_dot
interpreter.InterpreterBuilder.cast_impl = cast
interpreter.InterpreterBuilder.create_dot = dot
# arguments are in place already; writing them over themselves would touch each page of a huge one
interpreter.GridExecutor._restore_args_dev = lambda *_: None
triton._on = lambda device: contextlib.nullcontext()


@contextlib.contextmanager
def last_program():
    """Of each launch, only the last program runs: the end of a huge tensor."""

    def call(executor, *arguments, **named):
        meta = {name: value for name, value in named.items() if name.isupper()}
        grid = executor.grid(meta) if callable(executor.grid) else executor.grid
        last = [size - 1 for size in grid] + [0] * (3 - len(grid))
        executor.grid = (1, 1, 1)
        builder = interpreter.interpreter_builder
        builder.grid_idx = tuple(last)
        with mock.patch.object(builder, "set_grid_idx"):
            return run(executor, *arguments, **named)

    run = interpreter.GridExecutor.__call__
    with mock.patch.object(interpreter.GridExecutor, "__call__", call):
        yield


# --- memory that ends where a tensor ends ----------------------------------------------------------------------


def ending(*shape: int, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
    """As torch.empty. To read or write an element too far ends the process: a page that may not be touched follows."""
    size = math.prod(shape) * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE)
    if not size:
        return empty(*shape, dtype=dtype)
    block = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(start + pages * mmap.PAGESIZE, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = pages * mmap.PAGESIZE - size
    return torch.frombuffer(block, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def moved(tensor: Tensor) -> Tensor:
    return ending(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


empty = torch.empty


# --- the cases -------------------------------------------------------------------------------------------------


def drawn(shape: list[int], case: dict) -> Tensor:
    """Normal values in blocks of very different size, with a block of zeros, of values with no finite reciprocal, and,
    where asked for, of what is not finite."""
    flat = torch.randn(int(np.prod(shape)), generator=torch.Generator().manual_seed(case.get("seed", 0)))
    size = case.get("blocksize", 64)
    for block, scale in enumerate((1.0, 1e-3, 0.0, 30.0, 1e-39)):
        flat[(block + 1) * size : (block + 2) * size] *= scale
    if case.get("wild"):
        for at, value in ((3, float("nan")), (2 * size + 1, float("inf")), (3 * size + 5, -float("inf"))):
            flat[at : at + 1] = value
    return moved(flat.view(shape).to(getattr(torch, case.get("dtype", "float32"))))


def packed_of(case: dict) -> Packed:
    weight = drawn(case["shape"], {**case, "dtype": "float32"})
    size = case["blocksize"]
    codes, absmax = nf4.quantize_4bit(weight, case["quant_type"], size)
    offset = second = None
    if case.get("nested"):
        offset = absmax.mean()[None]
        absmax, second = nf4.quantize_8bit(absmax - offset, True, 256)
    stored = getattr(torch, case["dtype"])
    packed = Packed(codes, absmax, second, offset, case["quant_type"], size, weight.shape, stored)
    return dataclasses.replace(packed, **{name: moved(tensor) for name, tensor in packed.tensors().items()})


def unequal(what: str, found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{what}: {found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}; "
    if expected.is_floating_point():  # a NaN is one whatever its bits
        found, expected = found.nan_to_num(12345.0), expected.nan_to_num(12345.0)
    wrong = (found.view(SIZES[found.dtype]) != expected.view(SIZES[found.dtype])).flatten().nonzero()
    return f"{what}: {len(wrong)} of {found.numel()} differ, the first at {int(wrong[0])}; " if len(wrong) else ""


def dequantize(case: dict) -> str:
    packed = packed_of(case)
    out = ending(*packed.shape, dtype=packed.dtype)
    expected = torch.empty_like(out)
    triton.dequantize_4bit(packed, out)
    nf4.dequantize_4bit(packed, expected)
    return unequal("weight", out, expected)


def quantize(case: dict) -> str:
    weight = drawn(case["shape"], case)
    found = triton.quantize_4bit(weight, case["quant_type"], case["blocksize"])
    expected = nf4.quantize_4bit(weight, case["quant_type"], case["blocksize"])
    return unequal("codes", found[0], expected[0]) + unequal("absmax", found[1], expected[1])


def ties(case: dict) -> str:
    """Values exactly on each threshold, and one step to both sides of it."""
    bounds = nf4.thresholds(case["quant_type"], torch.device("cpu"))
    steps = [bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))]
    weight = torch.cat([torch.ones(1), torch.zeros(2), *steps])
    found = triton.quantize_4bit(weight, case["quant_type"], 64)
    return unequal("codes", found[0], nf4.quantize_4bit(weight, case["quant_type"], 64)[0])


def eight_bits(case: dict) -> str:
    values = drawn(case["shape"], case)
    values = values if case["signed"] else values.abs()
    found = triton.quantize_8bit(values, case["signed"], case["blocksize"])
    expected = nf4.quantize_8bit(values, case["signed"], case["blocksize"])
    fault = unequal("codes", found[0], expected[0]) + unequal("absmax", found[1], expected[1])
    back, expected_back = moved(torch.full_like(values, 7.0)), torch.empty_like(values)
    triton.dequantize_8bit(*map(moved, expected), case["signed"], case["blocksize"], back)
    nf4.dequantize_8bit(*expected, case["signed"], case["blocksize"], expected_back)
    return fault + unequal("values", back, expected_back)


def linear(case: dict) -> str:
    """Against the reference in float32, to within the order of summation and one rounding of the result."""
    packed = packed_of({**case, "dtype": case.get("stored", case["dtype"])})
    dtype = getattr(torch, case["dtype"])
    x = torch.randn(case["rows"], case["shape"][1], generator=torch.Generator().manual_seed(1)).to(dtype)
    x = x.t().contiguous().t() if case.get("strided") else moved(x)
    with (
        mock.patch.object(triton, "_multiprocessors", return_value=case["multiprocessors"]),
        mock.patch.object(triton, "_has_bfloat16", return_value=case.get("modern", True)),
    ):
        found = triton.linear_4bit(x, packed)
    if found.shape != (case["rows"], case["shape"][0]) or found.dtype != dtype:
        return f"{found.dtype} {list(found.shape)}"
    weight = torch.empty(*packed.shape, dtype=packed.dtype)
    nf4.dequantize_4bit(packed, weight)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    far = (found - exact).abs() / (1e-6 * size + torch.finfo(dtype).eps / 2 * exact.abs() + 1e-30)
    return f"{far.max():.2f} times the allowed error" if far.numel() and not far.max() <= 1 else ""


def huge_dequantize(case: dict) -> str:
    """The last elements of more than 2^31; memory that is not touched is not taken."""
    start, n = 2**31, 2**31 + 1500
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // 64), dtype=torch.uint8)
    second = torch.empty(-(-absmax.numel() // 256))
    generator = torch.Generator().manual_seed(0)
    codes[start // 2 :].random_(generator=generator)
    absmax[start // 64 :].random_(generator=generator)
    second[start // 64 // 256 :] = 3.0
    offset = torch.tensor([0.5])
    out = torch.empty(n, dtype=torch.float16)
    with last_program():
        triton.dequantize_4bit(
            Packed(codes, absmax, second, offset, "nf4", 64, torch.Size([n]), torch.float16),
            out,
        )
    tail = Packed(
        codes[start // 2 :],
        absmax[start // 64 :],
        second[start // 64 // 256 :],
        offset,
        "nf4",
        64,
        torch.Size([n - start]),
        torch.float16,
    )
    expected = torch.empty(n - start, dtype=torch.float16)
    nf4.dequantize_4bit(tail, expected)
    return unequal("end", out[start + triton.TILES[0][0] :], expected[triton.TILES[0][0] :])


def huge_quantize(case: dict) -> str:
    start, n = 2**31, 2**31 + 1500
    weight = torch.empty(n, dtype=torch.float16)
    weight[start:] = torch.randn(n - start, generator=torch.Generator().manual_seed(0)).half()
    with last_program():
        codes, absmax = triton.quantize_4bit(weight, "fp4", 64)
    expected = nf4.quantize_4bit(weight[start:], "fp4", 64)
    first = start + triton.TILE
    return unequal("codes", codes[first // 2 :], expected[0][triton.TILE // 2 :]) + unequal(
        "absmax", absmax[first // 64 :], expected[1][triton.TILE // 64 :]
    )


def huge_linear(case: dict) -> str:
    """The last outputs of a weight of more than 2^31 elements."""
    outputs, width = 2**20 + 3, 2**11 + 64
    codes = torch.empty(outputs * width // 2, dtype=torch.uint8)
    absmax = torch.empty(outputs * width // 64)
    last = 3 * width
    codes[-last // 2 :].random_(generator=torch.Generator().manual_seed(0))
    absmax[-last // 64 :] = torch.rand(last // 64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    packed = Packed(codes, absmax, None, None, "nf4", 64, torch.Size([outputs, width]), torch.float32)
    with (
        last_program(),
        mock.patch.object(triton, "_multiprocessors", return_value=1),
        mock.patch.object(triton, "_has_bfloat16", return_value=True),
    ):
        found = triton.linear_4bit(x, packed)[:, -3:]
    end = Packed(
        codes[-last // 2 :], absmax[-last // 64 :], None, None, "nf4", 64, torch.Size([3, width]), torch.float32
    )
    far = (found - nf4.linear_4bit(x, end)).abs().max()
    return "" if far <= 1e-4 else f"off by {far}"


KINDS = {
    "dequantize": dequantize,
    "quantize": quantize,
    "ties": ties,
    "eight_bits": eight_bits,
    "linear": linear,
    "huge_dequantize": huge_dequantize,
    "huge_quantize": huge_quantize,
    "huge_linear": huge_linear,
}


def judged(case: dict) -> str:
    with contextlib.ExitStack() as stack:
        if "tile" in case:
            stack.enter_context(mock.patch.object(triton, "TILES", [(case["tile"], 4)]))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True))
        stack.enter_context(mock.patch.object(torch, "empty", ending))
        try:
            return KINDS[case["kind"]](case)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    faulthandler.enable()
    for case in json.load(sys.stdin):
        print(json.dumps(judged(case)), flush=True)
