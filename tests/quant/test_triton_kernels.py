"""The kernels on a GPU: the same bits as on the CPU, the product to within its rounding, graphs and the compiler."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from deltaw.quant import nf4, triton
from deltaw.quant.ops import dequantize_4bit, linear_4bit, quantize_4bit, quantize_8bit
from deltaw.quant.packed import BLOCKSIZES, Packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


def on_cpu(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(packed.shape, dtype=dtype)
    nf4.dequantize_4bit(packed.to("cpu"), out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(33, 67), (2049, 2048 + 3)])
def test_has_the_bits_of_the_cpu(shape, quant_type, nested, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, absmax = triton.quantize_4bit(weight.cuda(), quant_type, 64)
    expected = nf4.quantize_4bit(weight, quant_type, 64)
    assert torch.equal(codes.cpu(), expected[0])
    assert torch.equal(absmax.cpu(), expected[1])
    packed = quantize_4bit(weight, quant_type, nested=nested)
    assert torch.equal(dequantize_4bit(packed.to("cuda")).cpu(), on_cpu(packed, dtype))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocksizes(blocksize):
    weight = torch.randn(3, 4099, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = quantize_4bit(weight, blocksize=blocksize, nested=True)
    assert torch.equal(dequantize_4bit(packed.to("cuda")).cpu(), on_cpu(packed, torch.bfloat16))
    assert torch.equal(triton.quantize_4bit(weight.cuda(), "nf4", blocksize)[0].cpu(), packed.codes)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits(signed):
    values = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.abs()
    expected = quantize_8bit(values, signed=signed)
    found = triton.quantize_8bit(values.cuda(), signed, 256)
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])
    back, expected_back = torch.empty_like(values, device="cuda"), torch.empty_like(values)
    triton.dequantize_8bit(*found, signed, 256, back)
    nf4.dequantize_8bit(*expected, signed, 256, expected_back)
    assert torch.equal(back.cpu(), expected_back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("shape", [(2048, 2048), (11008, 4096), (130, 1090), (65, 1021)])
def test_product(shape, rows, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    packed = quantize_4bit(weight, nested=True).to("cuda")
    read = dequantize_4bit(packed).double()
    found = linear_4bit(x, packed)
    exact, size = x.double() @ read.T, x.double().abs() @ read.abs().T
    assert found.dtype == dtype
    assert ((found - exact).abs() <= 1e-5 * size + torch.finfo(dtype).eps * exact.abs()).all()
    assert torch.equal(found, linear_4bit(x, packed))


def test_more_than_two_to_the_31():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free memory on the GPU")
    n, start = 2**31 + 1501, 2**31
    weight = torch.zeros(n, dtype=torch.float16, device="cuda")
    weight[start:] = torch.randn(n - start, device="cuda").half()
    packed = quantize_4bit(weight, nested=False)
    end = quantize_4bit(weight[start:].cpu(), nested=False)
    assert torch.equal(packed.codes[start // 2 :].cpu(), end.codes)
    assert torch.equal(dequantize_4bit(packed)[start:].cpu(), on_cpu(end, torch.float16))


def test_graph_and_compiler():
    """A captured graph reads what the tensors hold when it is replayed, and a compiled function holds the operation."""
    first, second = (quantize_4bit(torch.randn(256, 192).cuda(), nested=True, dtype=torch.bfloat16) for _ in range(2))
    x = torch.randn(2, 192, device="cuda").bfloat16()

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return dequantize_4bit(packed), linear_4bit(x, packed)

    packed = first.clone()
    both()  # compiles the kernels, which a capture may not wait for
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight, product = both()
    for name, tensor in packed.tensors().items():
        tensor.copy_(second.tensors()[name])
    graph.replay()
    assert torch.equal(weight, dequantize_4bit(second))
    assert torch.equal(product, linear_4bit(x, second))
    compiled = torch.compile(both, fullgraph=True)()
    assert torch.equal(compiled[0], weight)
    assert torch.equal(compiled[1], product)
