"""The five operations as torch sees them: schema, shapes for the compiler, and the same bits when they are traced."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import ConfigError
from deltaw.quant import ops
from deltaw.quant.backends import VARIABLE, backend_named
from deltaw.quant.packed import Packed

CPU = torch.device("cpu")
library = torch.ops.deltaw


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    """Each backend that runs on a CPU."""
    why = backend_named(request.param).unavailable(CPU)
    if why:
        pytest.skip(why)
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def weight(shape=(12, 40), dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(12, 40), (3, 33), (0, 8), (7,)], ids=str)
def test_opcheck_quantize_4bit(backend, shape, quant_type):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.library.opcheck(library.quantize_4bit.default, (weight(shape, dtype), quant_type, 32))
    torch.library.opcheck(library.quantize_4bit.default, (weight((40, 12)).T, quant_type, 64))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(12, 40), (3, 33), (0, 8), (7,)], ids=str)
def test_opcheck_dequantize_4bit(backend, shape, nested):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = ops.quantize_4bit(weight(shape, dtype), nested=nested)
        torch.library.opcheck(library.dequantize_4bit.default, ops._fields(packed))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_opcheck_linear_4bit(backend, rows, nested):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        packed = ops.quantize_4bit(weight(dtype=dtype), nested=nested)
        torch.library.opcheck(library.linear_4bit.default, (weight((rows, 40), dtype), *ops._fields(packed)))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_opcheck_8bit(backend, n, signed):
    values = weight((n,), torch.float32).abs()
    torch.library.opcheck(library.quantize_8bit.default, (values, signed, 256))
    codes, absmax = ops.quantize_8bit(values, signed=signed)
    torch.library.opcheck(library.dequantize_8bit.default, (codes, absmax, signed, 256))


@pytest.mark.parametrize("nested", [False, True])
def test_in_a_graph_the_bits_are_the_same(backend, nested):
    def all_of_them(dense: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed = ops.quantize_4bit(dense, nested=nested)
        return packed.codes, packed.absmax, ops.dequantize_4bit(packed), ops.linear_4bit(x, packed)

    x = weight((2, 3, 40))
    traced = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ours, theirs in zip(traced(weight(), x), all_of_them(weight(), x), strict=True):
            assert torch.equal(ours, theirs)


def test_the_backends_agree(monkeypatch):
    """Through the public functions, and double quantized."""
    found: dict[str, tuple[Packed, torch.Tensor]] = {}
    for name in ("native", "reference"):
        if backend_named(name).unavailable(CPU):
            pytest.skip("no kernels were compiled here")
        monkeypatch.setenv(VARIABLE, name)
        packed = ops.quantize_4bit(weight((96, 130)), nested=True)
        found[name] = packed, ops.dequantize_4bit(packed)
    (ours, dense), (theirs, expected) = found["native"], found["reference"]
    assert all(torch.equal(tensor, theirs.tensors()[name]) for name, tensor in ours.tensors().items())
    assert torch.equal(dense, expected)


def test_the_output_may_be_given(backend):
    packed = ops.quantize_4bit(weight())
    out = torch.zeros(12, 40, dtype=torch.bfloat16)
    assert ops.dequantize_4bit(packed, out=out) is out
    assert torch.equal(out, ops.dequantize_4bit(packed))
    codes, absmax = ops.quantize_8bit(weight(dtype=torch.float32).view(-1), signed=True)
    flat = torch.zeros(480)
    assert ops.dequantize_8bit(codes, absmax, signed=True, out=flat) is flat
    assert torch.equal(flat, ops.dequantize_8bit(codes, absmax, signed=True))


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "natve")
    with pytest.raises(ConfigError, match=r"DELTAW_QUANT_BACKEND='natve'.*did you mean 'native'"):
        ops.quantize_4bit(weight())
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ConfigError, match="cannot run on cpu"):
        ops.quantize_4bit(weight())


@pytest.mark.parametrize(
    ("change", "said"), [({"quant_type": "int4"}, "int4"), ({"blocksize": 48}, "48"), ({"blocksize": 16}, "16")]
)
def test_a_kind_or_blocksize_that_is_none_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        ops.quantize_4bit(weight(), **change)
