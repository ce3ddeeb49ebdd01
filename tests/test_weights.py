import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaw.weights import DenseStore, TransposedStore, has_store, is_a, is_finite, register_store, store_of, wide


def test_a_dense_store_is_a_handle_not_a_copy():
    layer = nn.Linear(3, 2, dtype=torch.bfloat16)
    store = store_of(layer)
    assert isinstance(store, DenseStore)
    assert store.dequantize() is layer.weight
    assert (store.shape, store.dtype, store.device.type, store.requires_grad) == (
        (2, 3),
        torch.bfloat16,
        "cpu",
        True,
    )
    layer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float64), requires_grad=False)
    assert store.dequantize() is layer.weight  # a replaced parameter is seen
    assert (store.dtype, store.requires_grad) == (torch.float64, False)


def test_dense_store_multiplies_writes_and_restores_bitwise():
    layer = nn.Linear(3, 2)
    store, x, before = store_of(layer), torch.randn(4, 3), layer.weight.detach().clone()
    assert torch.equal(store.linear(x, layer.bias), layer(x))
    kept = store.keep()
    store.requantize_(torch.zeros(2, 3))
    assert not layer.weight.any()
    store.restore_(kept)
    assert torch.equal(layer.weight, before)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("kind", [nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_layers_of_other_kinds_keep_a_dense_weight_too(kind):
    layer = kind(5, 3) if kind is nn.Embedding else kind(2, 4, 3)
    store, before = store_of(layer), layer.weight.detach().clone()
    assert isinstance(store, DenseStore)
    assert has_store(layer)
    assert store.shape == layer.weight.shape
    kept = store.keep()
    store.requantize_(before + 1)
    assert torch.equal(layer.weight, before + 1)
    store.restore_(kept)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_weight_is_read_written_and_restored_the_other_way_round(dtype):
    layer = Conv1D(4, 3).to(dtype)  # 3 -> 4
    store, x, before = TransposedStore(layer), torch.randn(2, 5, 3).to(dtype), layer.weight.detach().clone()
    assert (store.shape, store.dtype, store.requires_grad) == ((4, 3), dtype, True)
    assert torch.equal(store.dequantize(), before.T)
    assert store.dequantize().data_ptr() == layer.weight.data_ptr()  # a view, not a copy
    assert torch.equal(store.linear(x, layer.bias), layer(x))
    kept, new = store.keep(), torch.randn(4, 3).to(dtype)
    store.requantize_(new)
    assert torch.equal(layer.weight, new.T)
    assert torch.equal(store.dequantize(), new)
    assert layer.weight.is_contiguous()
    store.restore_(kept)
    assert torch.equal(layer.weight, before)


def test_a_module_without_a_store_is_named():
    assert not has_store(nn.LayerNorm(2))
    with pytest.raises(TypeError, match=r"no weight store for LayerNorm.*register_store"):
        store_of(nn.LayerNorm(2))


def test_a_weight_packed_by_another_library_has_no_store():
    """bitsandbytes' layers are nn.Linear too: their bytes must not be taken for a dense weight."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert not has_store(layer)


def test_the_newest_registration_wins(monkeypatch):
    monkeypatch.setattr("deltaw.weights._STORES", [(nn.Linear, DenseStore)])

    class Halved(nn.Linear):
        pass

    class HalvedStore(DenseStore):
        def dequantize(self) -> Tensor:
            return super().dequantize() / 2

    register_store(Halved, HalvedStore)
    assert type(store_of(Halved(2, 2))) is HalvedStore
    assert type(store_of(nn.Linear(2, 2))) is DenseStore


@pytest.mark.parametrize(
    ("given", "used"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_wide(given, used):
    assert wide(torch.zeros(1, dtype=given)).dtype == used


def test_a_class_may_be_known_by_its_full_name():
    class Deeper(nn.Linear):
        pass

    assert is_a(Deeper(1, 1), nn.Linear)
    assert is_a(Deeper(1, 1), "torch.nn.modules.linear.Linear")
    assert not is_a(nn.LayerNorm(1), "torch.nn.modules.linear.Linear")
    assert isinstance(store_of(Conv1D(2, 2)), TransposedStore)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_one_bad_number_is_found_among_many(dtype: torch.dtype, bad: float | None) -> None:
    for size in (1, 7, 1000):
        values = torch.randn(size).to(dtype)
        if bad is not None:
            values[size // 2] = bad
        assert is_finite(values) == (bad is None)
    assert is_finite(torch.empty(0, dtype=dtype))
