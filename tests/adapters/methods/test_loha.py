"""LoHa's formula: the elementwise product, its Khatri-Rao factors, and the choice between them and ΔW."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

from deltaw.adapters import Linear
from deltaw.adapters.hosts.conv import Conv
from deltaw.adapters.methods.loha import LoHa, LoHaConfig, LoHaConv


def loha(layer: nn.Module, **fields) -> Linear | Conv:
    host, method = (Linear(layer), LoHa) if isinstance(layer, nn.Linear) else (Conv(layer), LoHaConv)
    host.requires_grad_(False)
    host.add(method, "a", LoHaConfig(init_weights=False, **fields), "layer")
    host.set_active(["a"])
    return host


def slots(host) -> list[Tensor]:
    return [getattr(host, f"hada_{slot}")["a"] for slot in ("w1_a", "w1_b", "w2_a", "w2_b")]


def paper(host, alpha: float, r: int) -> Tensor:
    """ΔW as the paper writes it."""
    w1_a, w1_b, w2_a, w2_b = slots(host)
    return alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    r=st.integers(1, 9),
    alpha=st.one_of(st.integers(-20, 64), st.floats(0.1, 50)),
    batch=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    builds=st.booleans(),
)
def test_the_update_is_the_formula_and_merging_is_the_forward(shape, r, alpha, batch, bias, builds):
    torch.manual_seed(0)
    host = loha(nn.Linear(*shape, bias=bias, dtype=torch.float64), r=r, alpha=alpha)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoHa, "_builds", lambda self, x: builds)
        delta = paper(host, alpha, r)
        torch.testing.assert_close(host.adapters["a"].delta_weight(), delta)
        x = torch.randn(*batch, shape[0], dtype=torch.float64, requires_grad=True)
        out, plain = host(x), host.base_layer(x) + F.linear(x, delta)
        torch.testing.assert_close(out, plain)
        weight = torch.randn_like(plain)
        mine, theirs = (torch.autograd.grad(y, (x, *slots(host)), weight) for y in (out, plain))
        torch.testing.assert_close(mine, theirs)
        host.adapters["a"].forward(x, host.base_layer(x))
        torch.testing.assert_close(host.adapters["a"].forward(x, host.base_layer(x)), plain)
        before = host.weight.detach().clone()
        host.merge(["a"])
        torch.testing.assert_close(host(x), out)
        host.unmerge()
        assert torch.equal(host.weight, before)


@given(
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    r=st.integers(1, 5),
    effective=st.booleans(),
)
def test_convolutions_with_and_without_a_core(channels, kernel, r, effective):
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d)[len(kernel) - 1]
    host = loha(kind(*channels, tuple(kernel), dtype=torch.float64), r=r, alpha=3, use_effective_conv2d=effective)
    if effective and max(kernel) > 1:
        w1_a, w1_b, w2_a, w2_b = slots(host)
        core = "pqkl,qi,po->oikl"
        delta = torch.einsum(core, host.hada_t1["a"], w1_b, w1_a) * torch.einsum(core, host.hada_t2["a"], w2_b, w2_a)
        delta = delta * 3 / r
    else:
        assert "a" not in host.hada_t1
        delta = paper(host, 3, r)
    torch.testing.assert_close(host.adapters["a"].delta_weight(), delta.reshape(host.weight.shape))
    x = torch.randn(2, channels[0], *[k + 2 for k in kernel], dtype=torch.float64)
    convolve = (F.conv1d, F.conv2d)[len(kernel) - 1]
    plain = convolve(x, host.weight + delta.reshape(host.weight.shape), host.bias)
    torch.testing.assert_close(host(x), plain)
    parameters = list(host.adapters["a"].parameters())
    mine, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (host(x), plain))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("r", "rows", "dtype", "builds"),
    [
        (8, 4096, torch.bfloat16, False),  # 64 columns are less than 576 / 2
        (16, 4096, torch.bfloat16, False),  # 256 still are, where ΔW has products of its own
        (8, 4096, torch.float32, False),
        (16, 4096, torch.float32, True),  # folded into the base's product ΔW costs one product, its gradient
        (32, 1024, torch.bfloat16, True),  # 1024 columns are more
        (32, 16, torch.bfloat16, False),  # a few tokens: not worth making ΔW
    ],
)
def test_takes_the_route_with_fewer_operations(r, rows, dtype, builds):
    host = loha(nn.Linear(576, 576, dtype=dtype), r=r)
    adapter = host.adapters["a"]
    assert isinstance(adapter, LoHa)
    assert adapter._builds(torch.empty(1, rows, 576, dtype=dtype)) == builds


def test_the_factors_of_rank_r_squared_are_the_update():
    host = loha(nn.Linear(7, 6), r=3, alpha=5)
    factors = host.adapters["a"].factors()
    assert factors.A.shape == (9, 7)
    assert factors.B.shape == (6, 9)
    torch.testing.assert_close(factors.scaling * factors.B @ factors.A, paper(host, 5, 3))
