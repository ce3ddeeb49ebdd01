"""A weight in four bits under the weight-store contract."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.quant import NF4Config, NF4Linear, Packed, QuantizedWeight, dequantize_4bit, quantize_4bit
from deltaw.weights import has_store, only_multiplies, store_of

CONFIGS = {
    "nf4": NF4Config(),
    "nf4 nested": NF4Config(bnb_4bit_use_double_quant=True),
    "fp4 nested": NF4Config(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True, bnb_4bit_blocksize=32),
    "stored as bf16": NF4Config(bnb_4bit_quant_storage="bfloat16"),
}


@pytest.fixture(params=CONFIGS)
def layer(request) -> NF4Linear:
    torch.manual_seed(0)
    return NF4Linear.from_linear(nn.Linear(40, 24, dtype=torch.bfloat16), CONFIGS[request.param])


def same(one: Packed, other: Packed) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def weight() -> Tensor:
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(1))


def test_it_is_found_for_the_layer(layer):
    store = store_of(layer)
    assert isinstance(store, QuantizedWeight)
    assert has_store(layer)
    assert only_multiplies(layer)
    assert (store.shape, store.dtype, store.device) == ((24, 40), torch.bfloat16, torch.device("cpu"))
    assert not store.requires_grad
    assert store.quantized


def test_it_reads_what_is_packed(layer):
    store = store_of(layer)
    read = store.dequantize()
    assert read.dtype == store.dtype
    assert torch.equal(read, dequantize_4bit(layer.packed))
    read.zero_()  # a copy, not the weight
    assert store.dequantize().any()


def test_it_writes_in_the_same_format(layer):
    store, before = store_of(layer), layer.packed
    parameters = [id(p) for p in layer.parameters()]
    store.requantize_(weight())
    own = layer.packed
    expected = quantize_4bit(weight(), before.quant_type, before.blocksize, nested=before.nested)
    assert same(own, expected)
    assert (own.dtype, own.quant_type, own.blocksize, own.nested) == (
        before.dtype,
        before.quant_type,
        before.blocksize,
        before.nested,
    )
    assert [id(p) for p in layer.parameters()] == parameters  # in place: FSDP and an optimizer hold them
    assert (store.dequantize().float() - weight()).abs().mean() < 0.15


def test_what_was_kept_comes_back_bitwise(layer):
    store = store_of(layer)
    before = layer.packed.clone()
    kept = store.keep()
    store.requantize_(weight())
    assert not same(layer.packed, before)
    assert same(kept, before)
    store.restore_(kept)
    assert same(layer.packed, before)
    store.requantize_(weight())
    store.restore_(kept)  # and once more
    assert same(layer.packed, before)


def test_it_sees_parameters_that_were_replaced(layer):
    store = store_of(layer)
    layer.load_state_dict({key: tensor.clone() for key, tensor in layer.state_dict().items()}, assign=True)
    store.requantize_(weight())
    assert torch.equal(store.dequantize(), dequantize_4bit(layer.packed))


@pytest.mark.parametrize("recorded", [True, False])
def test_it_multiplies(layer, recorded):
    store, x = store_of(layer), torch.randn(3, 16, 40, dtype=torch.bfloat16)
    with torch.set_grad_enabled(recorded):
        assert torch.equal(store.linear(x, layer.bias), F.linear(x, store.dequantize(), layer.bias))


def test_it_multiplies_in_the_layers_dtype():
    config = NF4Config(bnb_4bit_compute_dtype=torch.bfloat16)
    layer = NF4Linear.from_linear(nn.Linear(40, 24), config)
    store, x = store_of(layer), torch.randn(16, 40)
    assert store.compute_dtype == torch.bfloat16
    out = store.linear(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, F.linear(x.bfloat16(), store.dequantize().bfloat16()).float())


def test_another_class_over_it_may_do_more():
    class Scaled(NF4Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Scaled.from_linear(nn.Linear(40, 24), NF4Config())
    assert isinstance(store_of(layer), QuantizedWeight)
    assert not only_multiplies(layer)
