"""The fused low-rank linear against the plain formula: values, gradients, precision, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.ops import lowrank_linear, lowrank_linear_reference
from deltaw.ops.lowrank import keep_mask
from deltaw.ops.swiglu import swiglu
from deltaw.weights import DenseStore, store_of


def parts(
    dtype: torch.dtype = torch.float64,
    *,
    masters: torch.dtype | None = None,
    bias: bool = True,
    rows: tuple[int, ...] = (2, 5),
) -> tuple[Tensor, DenseStore, Tensor | None, Tensor, Tensor]:
    """x (..., 6), W (7, 6), bias (7,), A (3, 6), B (7, 3)."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 7, bias=bias, dtype=dtype).requires_grad_(False)
    masters = masters or dtype
    x = torch.randn(*rows, 6, dtype=dtype, requires_grad=True)
    A = torch.randn(3, 6, dtype=masters, requires_grad=True)
    B = torch.randn(7, 3, dtype=masters, requires_grad=True)
    return x, store_of(layer), layer.bias, A, B  # type: ignore[return-value]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(2, 5), (4,), (1, 1, 1)])
def test_gradcheck(bias: bool, rows: tuple[int, ...]) -> None:
    x, store, b, A, B = parts(bias=bias, rows=rows)
    assert torch.autograd.gradcheck(lambda x, A, B: lowrank_linear(x, store, b, A, B, 0.7), (x, A, B))


def test_gradcheck_of_a_bias_that_trains() -> None:
    x, store, b, A, B = parts()
    assert b is not None
    bias = b.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda bias: lowrank_linear(x, store, bias, A, B, 0.7), (bias,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_the_formula(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    x, store, b, A, B = parts(dtype, masters=torch.float32, bias=bias)
    weight = torch.randn(2, 5, 7).to(dtype)
    results = []
    for function in (lowrank_linear, lowrank_linear_reference):
        out = function(x, store, b, A, B, 0.7)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, (x, A, B), weight)))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours.float() - plain.float()).norm() <= tolerance * plain.float().norm()


def test_zero_B_is_the_base_bitwise() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias in (True, False):
            torch.manual_seed(1)
            layer = nn.Linear(96, 40, bias=bias, dtype=dtype).requires_grad_(False)
            x = torch.randn(3, 17, 96).to(dtype)
            A, B = torch.randn(8, 96), torch.zeros(40, 8)
            assert torch.equal(lowrank_linear(x, store_of(layer), layer.bias, A, B, 2.0), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_small_updates_survive_in_bfloat16(bias: bool) -> None:
    """An update far below the output's last place must still move the output on average, as in float32."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(512, 256).bfloat16()
    A, B = torch.randn(8, 256) / 16, torch.randn(256, 8) * 1e-4
    base = layer(x).float()
    update = (x.float() @ A.t()) @ B.t()
    assert update.abs().mean() < base.abs().mean() * 2**-9  # below half a unit in the last place
    ours = lowrank_linear(x, store_of(layer), layer.bias, A, B, 1.0).float() - base
    added_late = (base.bfloat16() + update).bfloat16().float() - base
    slope = lambda moved: ((moved * update).sum() / update.square().sum()).item()  # noqa: E731
    assert abs(slope(ours) - 1) < 0.15
    assert slope(added_late) < 0.75  # what adding to a rounded output leaves of it


def test_dropout_is_the_formula_with_the_same_mask() -> None:
    x, store, b, A, B = parts()
    torch.manual_seed(7)
    ours = lowrank_linear(x, store, b, A, B, 0.7, dropout=0.4)
    torch.manual_seed(7)
    keep = keep_mask(x, 0.4)
    plain = lowrank_linear_reference(x, store, b, A, B, 0.7, dropout=0.4, keep=keep)
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(ours)
    grads = [torch.autograd.grad(out, (x, A, B), weight) for out in (ours, plain)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_dropout_rate_and_shape() -> None:
    torch.manual_seed(0)
    for p in (0.05, 0.5, 0.1):
        keep = keep_mask(torch.empty(301, 333), p)
        assert keep.shape == (301, 333)
        assert abs(1 - keep.float().mean().item() - p) < 0.005


def test_second_derivatives_are_refused() -> None:
    x, store, b, A, B = parts()
    out = lowrank_linear(x, store, b, A, B, 1.0)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_no_gradient_for_x_when_it_needs_none() -> None:
    x, store, b, A, B = parts()
    out = lowrank_linear(x.detach(), store, b, A, B, 1.0)
    dA, dB = torch.autograd.grad(out.sum(), (A, B))
    plain = lowrank_linear_reference(x.detach(), store, b, A, B, 1.0)
    torch.testing.assert_close((dA, dB), torch.autograd.grad(plain.sum(), (A, B)))


def test_a_base_weight_that_trains_gets_its_gradient() -> None:
    x, _, _, A, B = parts()
    layer = nn.Linear(6, 7, dtype=torch.float64)
    lowrank_linear(x, store_of(layer), layer.bias, A, B, 1.0).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.detach().reshape(-1, 6).sum(0).expand(7, 6))


def test_keeps_x_itself_and_no_copy() -> None:
    x, store, b, A, B = parts(torch.bfloat16, masters=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lowrank_linear(x, store, b, A, B, 1.0)
    others = [t for t in kept if t is not None and t.data_ptr() not in (x.data_ptr(), A.data_ptr(), B.data_ptr())]
    assert [tuple(t.shape) for t in others] == [(10, 3)]  # only x A^T


def test_a_remembered_product_is_made_again() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 7, dtype=torch.float64).requires_grad_(False)
    gate, up = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    A = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    B = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)

    def through(gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lowrank_linear(swiglu(gate, up), store_of(layer), layer.bias, A, B, 0.7)

    assert torch.autograd.gradcheck(through, (gate, up, A, B))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        product = swiglu(gate, up)
        lowrank_linear(product, store_of(layer), layer.bias, A, B, 0.7)
    assert product.data_ptr() not in kept


def test_under_autocast_it_works_in_bfloat16() -> None:
    x, store, b, A, B = parts(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = lowrank_linear(x, store, b, A, B, 1.0)
        plain = F.linear(x, store.dequantize(), b) + F.linear(F.linear(x, A), B)
    assert out.dtype == torch.bfloat16
    assert (out.float() - plain.float()).norm() < 0.02 * plain.float().norm()
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert A.grad is not None
    assert A.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    x, store, b, A, B = parts()
    grads = []
    for wrap in (False, True):
        torch.manual_seed(3)
        run = lambda x: lowrank_linear(x, store, b, A, B, 1.0, dropout=0.3)  # noqa: E731
        out = checkpoint(run, x, use_reentrant=reentrant) if wrap else run(x)
        grads.append(torch.autograd.grad(out.sum(), (x, A, B)) if not (wrap and reentrant) else _backward(out, x, A, B))
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def _backward(out: Tensor, *wanted: Tensor) -> list[Tensor]:
    """Gradients through .backward(), which reentrant checkpointing asks for."""
    for tensor in wanted:
        tensor.grad = None
    out.sum().backward()
    return [tensor.grad for tensor in wanted]  # type: ignore[misc]


def test_compiles_without_a_break() -> None:
    x, store, b, A, B = parts(torch.float32)
    compiled = torch.compile(lambda x: lowrank_linear(x, store, b, A, B, 0.7), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), lowrank_linear(x, store, b, A, B, 0.7))
    (mine,) = torch.autograd.grad(compiled(x).sum(), A)
    (theirs,) = torch.autograd.grad(lowrank_linear(x, store, b, A, B, 0.7).sum(), A)
    torch.testing.assert_close(mine, theirs)
