"""A lazy weight is the dense tensor that it reads as, to the bit, and nothing dense is saved for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltaw.quant.lazy import LazyWeight, part
from deltaw.quant.ops import dequantize_4bit, quantize_4bit


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, nested: bool = False) -> tuple[LazyWeight, Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = quantize_4bit(weight, nested=nested)
    return LazyWeight(packed), dequantize_4bit(packed)


VIEWS = {
    "whole": lambda w: w,
    "one": lambda w: w[2],
    "by a tensor": lambda w: w[torch.tensor(3)],
    "some": lambda w: w[1:3],
    "transposed": lambda w: w.transpose(-2, -1),
    "one transposed": lambda w: w[1].t(),
    "rows of one": lambda w: w[1][5:9],
    "columns": lambda w: w[..., 3:7],
    "flat": lambda w: w.view(-1),
    "none": lambda w: w[2:2],
    "cast": lambda w: w.to(torch.float64)[1],
    "one cast": lambda w: w[1].to(torch.float64)[3:],
    "chunks": lambda w: w.chunk(2)[1],
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_stay_lazy_and_read_as_the_dense_ones(view, nested):
    lazy, dense = pair((4, 130, 129), torch.bfloat16, nested)  # no multiple of a block
    seen, expected = view(lazy), view(dense)
    assert isinstance(seen, LazyWeight)
    assert (seen.shape, seen.stride(), seen.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert torch.equal(seen.read(), expected)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.data())
def test_any_part_is_the_same_part(experts, rows, columns, nested, data):
    lazy, dense = pair((experts, rows, columns), nested=nested)
    expert = data.draw(st.integers(0, experts - 1))
    row = data.draw(st.integers(0, rows - 1))
    assert torch.equal(lazy[expert, row:].read(), dense[expert, row:])


def test_only_the_blocks_of_a_part_are_read(monkeypatch):
    import deltaw.quant.lazy as module

    lazy, dense = pair((8, 64, 64), nested=False)
    sizes: list[int] = []

    def counted(packed):
        sizes.append(packed.numel())
        return dequantize_4bit(packed)

    monkeypatch.setattr(module, "dequantize_4bit", counted)
    assert torch.equal(lazy[3].read(), dense[3])
    assert sizes == [64 * 64]


def test_a_part_shares_the_bytes():
    packed = quantize_4bit(torch.randn(4, 64, 64), nested=True)
    first = 16384
    half = part(packed, first, packed.numel()) if packed.numel() > first else part(packed, 0, packed.numel())
    assert half.codes.untyped_storage().data_ptr() == packed.codes.untyped_storage().data_ptr()


PRODUCTS = {
    "linear": lambda x, w: F.linear(x, w[1]),
    "matmul": lambda x, w: x @ w[1].t(),
    "batched": lambda x, w: torch.bmm(w[torch.tensor([0, 2, 2])], x[:3].unsqueeze(-1)),
    "grouped": lambda x, w: F.grouped_mm(
        x, w.transpose(-2, -1), offs=torch.tensor([2, 2, 5, x.shape[0]], dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_and_gradients_are_bitwise_those_of_the_dense_weight(product, dtype):
    lazy, dense = pair((4, 48, 64), dtype)
    results = []
    for weight in (lazy, dense):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = product(x, weight)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
        results.append((out.detach(), x.grad))
    assert not isinstance(results[0][0], LazyWeight)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_dense_is_saved_for_backward():
    lazy, _ = pair((4, 48, 64))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.linear(x, lazy[1])
        F.grouped_mm(x, lazy.transpose(-2, -1), offs=torch.tensor([2, 2, 5, 8], dtype=torch.int32))
    weights = [tensor for tensor in saved if tensor.numel() >= 48 * 64]
    assert len(weights) == 2
    assert all(isinstance(tensor, LazyWeight) for tensor in weights)


def test_autocast_casts_without_keeping_a_dense_copy():
    lazy, dense = pair((4, 48, 64))
    saved: list[Tensor] = []
    results = []
    for weight in (lazy, dense):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
        with torch.autocast("cpu", dtype=torch.bfloat16), hooks:
            out = F.linear(x, weight[1])
        out.sum().backward()
        results.append((out.detach(), x.grad))
        if weight is lazy:
            assert not [t for t in saved if t.numel() == 48 * 64 and not isinstance(t, LazyWeight)]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_it_says_what_it_is_without_reading():
    lazy, _ = pair((4, 48, 64))
    assert repr(lazy) == "LazyWeight(nf4, size=(4, 48, 64), dtype=torch.float32)"
