"""A ΔW that is made again in backward: values, gradients, precision, and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.ops.delta import delta_linear, remade
from deltaw.ops.onto import onto
from deltaw.weights import store_of


def make(a: Tensor, b: Tensor) -> Tensor:
    """(7, 6) from (7, 3) and (3, 6), and not linear in either."""
    return torch.tanh(a @ b)


def parts(dtype=torch.float64, masters=None, bias=True, rows=(2, 5), size=1.0):
    torch.manual_seed(0)
    layer = nn.Linear(6, 7, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(*rows, 6).to(dtype).requires_grad_(True)
    a, b = ((torch.randn(*s) * size).to(masters or dtype).requires_grad_(True) for s in ((7, 3), (3, 6)))
    return layer, x, a, b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(2, 5), (4,), (1, 1, 1)])
def test_gradcheck(bias, rows) -> None:
    layer, x, a, b = parts(bias=bias, rows=rows)
    assert torch.autograd.gradcheck(lambda x, a, b: delta_linear(x, store_of(layer), layer.bias, make, a, b), (x, a, b))
    assert torch.autograd.gradcheck(lambda a, b: remade(make, a, b), (a, b))


def test_gradcheck_of_a_bias_that_trains() -> None:
    layer, x, a, b = parts()
    bias = layer.bias.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda bias: delta_linear(x, store_of(layer), bias, make, a, b), (bias,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_the_formula(dtype, tolerance, bias) -> None:
    layer, x, a, b = parts(dtype, torch.float32, bias)
    weight = torch.randn(2, 5, 7).to(dtype)
    ours = delta_linear(x, store_of(layer), layer.bias, make, a, b)
    plain = layer(x) + F.linear(x, make(a, b).to(dtype))
    assert ours.dtype == dtype
    pairs = zip(*((out, *torch.autograd.grad(out, (x, a, b), weight)) for out in (ours, plain)), strict=True)
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert (mine.float() - theirs.float()).norm() <= tolerance * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out"), [(96, 40), (576, 576), (33, 7), (1, 1), (1024, 64)])
@pytest.mark.parametrize("rows", [1, 2, 51, 300])
def test_a_zero_update_is_the_base_bitwise(dtype, bias, width, out, rows) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(width, out, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(3, rows, width).to(dtype)
    zero = torch.zeros(out, width)
    assert torch.equal(delta_linear(x, store_of(layer), layer.bias, torch.clone, zero), layer(x))
    flat = x.view(-1, width)
    assert torch.equal(onto(flat.new_zeros(len(flat), out), flat, layer.weight, layer.bias), layer(x).view(-1, out))


@pytest.mark.parametrize("bias", [True, False])
def test_small_updates_survive_in_bfloat16(bias) -> None:
    """An update far below the weight's and the output's last place must still move the output on average."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    if bias:
        layer.bias.mul_(20)
    x, delta = torch.randn(512, 256).bfloat16(), torch.randn(256, 256) * 3e-5
    base, update = layer(x).float(), x.float() @ delta.t()
    assert update.abs().mean() < base.abs().mean() * 2**-9
    moved = delta_linear(x, store_of(layer), layer.bias, torch.clone, delta).float() - base
    slope = lambda moved: ((moved * update).sum() / update.square().sum()).item()  # noqa: E731
    assert abs(slope(moved) - 1) < 0.15
    assert slope((base.bfloat16() + update).bfloat16().float() - base) < 0.75  # what adding to a rounded output leaves


def test_keeps_the_parameters_alone() -> None:
    layer, x, a, b = parts(torch.bfloat16, torch.float32)
    for run in (lambda: delta_linear(x, store_of(layer), layer.bias, make, a, b), lambda: remade(make, a, b)):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            run()
        assert kept
        assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (x, a, b)}


def test_gradients_of_those_alone_that_need_one() -> None:
    for wanted in ([1], [2], [0], [0, 2]):
        layer, *leaves = parts()
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index in wanted)
        x, a, b = leaves
        outs = delta_linear(x, store_of(layer), layer.bias, make, a, b), layer(x) + F.linear(x, make(a, b))
        mine, theirs = (torch.autograd.grad(out.sum(), [leaves[i] for i in wanted]) for out in outs)
        torch.testing.assert_close(mine, theirs)


def test_second_derivatives_are_refused() -> None:
    layer, x, a, b = parts()
    for out in (delta_linear(x, store_of(layer), layer.bias, make, a, b), remade(make, a, b)):
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(out.sum(), a, create_graph=True)


def test_a_base_weight_that_trains_gets_its_gradient() -> None:
    layer, x, a, b = parts()
    layer.requires_grad_(True)
    delta_linear(x, store_of(layer), layer.bias, make, a, b).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.detach().reshape(-1, 6).sum(0).expand(7, 6))


def test_under_autocast_the_products_are_in_bfloat16_and_the_making_is_not() -> None:
    layer, x, a, b = parts(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        delta = remade(make, a, b)
        out = delta_linear(x, store_of(layer), layer.bias, make, a, b)
        (out.sum() + delta.sum()).backward()
    assert out.dtype == torch.bfloat16
    assert torch.equal(delta, make(a, b))
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in (x, a, b))


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant) -> None:
    layer, x, a, b = parts()
    out = checkpoint(lambda x: delta_linear(x, store_of(layer), layer.bias, make, a, b), x, use_reentrant=reentrant)
    out.sum().backward()
    theirs = torch.autograd.grad((layer(x) + F.linear(x, make(a, b))).sum(), (x, a, b))
    torch.testing.assert_close((x.grad, a.grad, b.grad), theirs)


def test_compiles_without_a_break() -> None:
    layer, x, a, b = parts(torch.float32)

    def run(x: Tensor) -> Tensor:
        return delta_linear(x, store_of(layer), layer.bias, make, a, b) + remade(make, a, b).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    mine, theirs = (torch.autograd.grad(f(x).sum(), a) for f in (compiled, run))
    torch.testing.assert_close(mine, theirs)
