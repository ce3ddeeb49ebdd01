"""LoKr's formula: the Kronecker product, how a layer's sides are factorized, and which of the factors are whole."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from peer import in_order
from peft.tuners.lokr.layer import factorization as peft_factorization
from torch import Tensor, nn

from deltaw.adapters import Linear
from deltaw.adapters.hosts.conv import Conv
from deltaw.adapters.methods.lokr import LoKr, LoKrConfig, LoKrConv, factorization

factors = st.one_of(st.just(-1), st.integers(1, 12))


def lokr(layer: nn.Module, **fields) -> Linear | Conv:
    host, method = (Linear(layer), LoKr) if isinstance(layer, nn.Linear) else (Conv(layer), LoKrConv)
    host.requires_grad_(False)
    host.add(method, "a", LoKrConfig(**{"init_weights": False, **fields}), "layer")
    host.set_active(["a"])
    return host


def held(host) -> dict[str, Tensor]:
    return {slot.removeprefix("lokr_"): tensor for slot, tensor in host.adapters["a"].held.items()}


def paper(host, scaling: float) -> Tensor:
    """s w1 ⊗ w2, (out, in) or (out, in, kernel)."""
    p = held(host)
    w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    if "w2" in p:
        w2 = p["w2"]
    elif "t2" in p:
        w2 = torch.einsum("pqxy,pk,qn->knxy", p["t2"], p["w2_a"], p["w2_b"])
    else:
        w2 = p["w2_a"] @ p["w2_b"]
    w2 = w2.clone(memory_format=torch.contiguous_format)  # torch.kron trips over the strides of einsum
    return scaling * torch.kron(w1.view(*w1.shape, *[1] * (w2.ndim - 2)), w2).reshape(host.weight.shape)


@given(dimension=st.integers(1, 5000), factor=st.one_of(st.just(-1), st.integers(1, 200)))
def test_sides_are_factorized_as_in_peft(dimension, factor):
    m, n = factorization(dimension, factor)
    assert (m, n) == peft_factorization(dimension, factor)
    assert m * n == dimension


@pytest.mark.parametrize(
    ("dimension", "factor", "sides"),
    [(576, -1, (24, 24)), (1536, -1, (32, 48)), (127, -1, (1, 127)), (128, 4, (4, 32)), (8, 8, (8, 1)), (9, 2, (1, 9))],
)
def test_sides(dimension, factor, sides):
    assert factorization(dimension, factor) == sides


@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({"r": 4}, {"w1": (8, 6), "w2_a": (12, 4), "w2_b": (4, 8)}),
        ({"r": 6}, {"w1": (8, 6), "w2": (12, 8)}),  # from half of the larger side on
        ({"r": 2, "decompose_both": True}, {"w1_a": (8, 2), "w1_b": (2, 6), "w2_a": (12, 2), "w2_b": (2, 8)}),
        ({"r": 4, "decompose_both": True}, {"w1": (8, 6), "w2_a": (12, 4), "w2_b": (4, 8)}),
        ({"r": 2, "decompose_factor": 2}, {"w1": (2, 2), "w2_a": (48, 2), "w2_b": (2, 24)}),
    ],
)
def test_which_factors_are_whole(fields, shapes):
    host = lokr(nn.Linear(48, 96), **fields)
    assert {slot: tuple(tensor.shape) for slot, tensor in held(host).items()} == shapes


@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    r=st.integers(1, 8),
    alpha=st.one_of(st.integers(-20, 64), st.floats(0.1, 50)),
    both=st.booleans(),
    factor=factors,
    batch=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
)
def test_the_update_is_the_formula_and_merging_is_the_forward(shape, r, alpha, both, factor, batch, bias):
    torch.manual_seed(0)
    layer = nn.Linear(*shape, bias=bias, dtype=torch.float64)
    host = lokr(layer, r=r, alpha=alpha, decompose_both=both, decompose_factor=factor)
    delta = paper(host, alpha / r)
    torch.testing.assert_close(host.adapters["a"].delta_weight(), delta)
    x = torch.randn(*batch, shape[0], dtype=torch.float64, requires_grad=True)
    out, plain = host(x), layer(x) + F.linear(x, delta)
    torch.testing.assert_close(out, plain)
    leaves = (x, *host.adapters["a"].parameters())
    weight = torch.randn_like(plain)
    mine, theirs = (torch.autograd.grad(y, leaves, weight) for y in (out, plain))
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(host.adapters["a"].forward(x, layer(x)), plain)
    before = layer.weight.clone()
    host.merge(["a"])
    torch.testing.assert_close(host(x), out)
    host.unmerge()
    assert torch.equal(layer.weight, before)


@given(
    channels=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    r=st.integers(1, 4),
    effective=st.booleans(),
    both=st.booleans(),
)
def test_convolutions(channels, kernel, r, effective, both):
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d)[len(kernel) - 1]
    layer = kind(*channels, tuple(kernel), dtype=torch.float64)
    host = lokr(layer, r=r, alpha=3, use_effective_conv2d=effective, decompose_both=both)
    assume(len(kernel) == 2 or "w2" not in held(host))  # PEFT's own order, compared with PEFT's numbers elsewhere
    delta = paper(host, 3 / r)
    torch.testing.assert_close(host.adapters["a"].delta_weight(), delta)
    x = torch.randn(2, channels[0], *[k + 2 for k in kernel], dtype=torch.float64)
    convolve = (F.conv1d, F.conv2d)[len(kernel) - 1]
    plain = convolve(x, layer.weight + delta, layer.bias)
    torch.testing.assert_close(host(x), plain)
    parameters = list(host.adapters["a"].parameters())
    mine, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (host(x), plain))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("init", "zero"), [(True, {"w1", "w1_a"}), ("lycoris", {"w2", "w2_b"}), (False, set())], ids=in_order
)
@pytest.mark.parametrize("fields", [{"r": 8}, {"r": 1}, {"r": 1, "decompose_both": True}], ids=str)
def test_what_starts_at_zero(init, zero, fields):
    host = lokr(nn.Linear(36, 64), init_weights=init, **fields)
    assert {slot for slot, tensor in held(host).items() if not tensor.any()} == zero & set(held(host))
