"""The weights that one layer may hold, over plain and packed stores."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaw.adapters.bases import Bases, Rounding
from deltaw.quant import NF4Config, NF4Linear
from deltaw.weights import store_of


@pytest.mark.parametrize("packed", [False, True])
def test_each_comes_back_bitwise(packed):
    torch.manual_seed(0)
    layer = nn.Linear(64, 8).requires_grad_(False)
    store = store_of(NF4Linear.from_linear(layer, NF4Config()) if packed else layer)
    bases, held = Bases(), {None: store.dequantize().clone()}
    assert not bases
    for name in "ab":
        bases.replace(store, name, torch.randn(8, 64))
        held[name] = store.dequantize().clone()
    assert bases
    assert "a" in bases
    assert "c" not in bases
    for name in ("a", None, "b", "b", "a", None):
        bases.put(store, name)
        assert bases.inside == name
        assert torch.equal(store.dequantize(), held[name])
    bases.put(store, "c")  # has none
    assert torch.equal(store.dequantize(), held[None])
    bases.put(store, "b")
    bases.drop(store, "b")
    assert torch.equal(store.dequantize(), held[None])
    bases.drop(store, "a")
    assert not bases


def test_written_again_it_is_still_one():
    layer = nn.Linear(4, 4).requires_grad_(False)
    store, bases = store_of(layer), Bases()
    before = layer.weight.clone()
    bases.replace(store, "a", torch.ones(4, 4))
    bases.replace(store, "a", torch.zeros(4, 4))
    assert not layer.weight.any()
    bases.drop(store, "a")
    assert torch.equal(layer.weight, before)


def test_rounding_is_in_norms():
    found = Rounding.between(torch.zeros(2, 2), torch.full((2, 2), 3.0), torch.full((2, 2), 2.0))
    assert found == (2.0, 6.0, 6.0)
