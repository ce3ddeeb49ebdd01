"""The fused Kronecker linear against the dense product: values, gradients, precision, and what it keeps."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.ops import kron, kron_linear, kron_linear_reference
from deltaw.ops.kron import kron_product
from deltaw.ops.swiglu import swiglu
from deltaw.weights import store_of


class Parts:
    """x (..., m n), W (l k, m n), w1 (l, m), w2 (k, n) whole or of rank r, and a scale a row."""

    def __init__(
        self,
        l: int = 2,  # noqa: E741
        m: int = 3,
        k: int = 4,
        n: int = 5,
        r: int | None = None,
        *,
        dtype: torch.dtype = torch.float64,
        masters: torch.dtype | None = None,
        bias: bool = True,
        rows: tuple[int, ...] = (2, 3),
        scaled: bool = False,
        size: float = 1.0,
    ) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(m * n, l * k, bias=bias, dtype=dtype).requires_grad_(False)
        self.store, self.bias = store_of(self.layer), self.layer.bias
        self.x = torch.randn(*rows, m * n).to(dtype).requires_grad_(True)
        draw = lambda *shape: (torch.randn(*shape) * size).to(masters or dtype).requires_grad_(True)  # noqa: E731
        self.w1 = draw(l, m)
        self.w2 = draw(k, n) if r is None else (draw(k, r), draw(r, n))
        self.row_scale = torch.rand(l * k) if scaled else None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.w1, *((self.w2,) if isinstance(self.w2, Tensor) else self.w2))

    def dense(self) -> Tensor:
        """ΔW, as the paper writes it."""
        whole = self.w2 if isinstance(self.w2, Tensor) else self.w2[0] @ self.w2[1]
        delta = torch.kron(self.w1, whole) * 0.7
        return delta if self.row_scale is None else delta * self.row_scale[:, None].to(delta.dtype)

    def fused(self) -> Tensor:
        return kron_linear(self.x, self.store, self.bias, self.w1, self.w2, 0.7, row_scale=self.row_scale)

    def expected(self) -> Tensor:
        return self.layer(self.x) + F.linear(self.x, self.dense().to(self.x.dtype))


sides = st.integers(1, 5)


@given(
    shape=st.tuples(sides, sides, sides, sides),
    r=st.one_of(st.none(), st.integers(1, 4)),
    bias=st.booleans(),
    rows=st.lists(st.integers(0, 3), max_size=3),
    scaled=st.booleans(),
)
def test_values_and_gradients_are_those_of_the_dense_product(shape, r, bias, rows, scaled) -> None:
    parts = Parts(*shape, r, bias=bias, rows=tuple(rows), scaled=scaled)
    ours, plain = parts.fused(), parts.expected()
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(plain)
    mine, theirs = (torch.autograd.grad(out, parts.leaves, weight) for out in (ours, plain))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (5, 4, 2, 1), (1, 1, 6, 3)])
def test_gradcheck(r, shape) -> None:
    parts = Parts(*shape, r, scaled=True)

    def through(x: Tensor, w1: Tensor, *w2: Tensor) -> Tensor:
        second = w2[0] if r is None else (w2[0], w2[1])
        return kron_linear(x, parts.store, parts.bias, w1, second, 0.7, row_scale=parts.row_scale)

    assert torch.autograd.gradcheck(through, parts.leaves)


def test_gradcheck_of_a_bias_that_trains() -> None:
    parts = Parts()
    bias = parts.bias.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda bias: kron_linear(parts.x, parts.store, bias, parts.w1, parts.w2, 0.7), (bias,)
    )


@pytest.mark.parametrize(
    ("shape", "r", "sides"),
    [
        ((24, 24, 24, 24), 4, (True, True)),  # few columns: through the rank
        ((24, 24, 24, 30), 22, (True, False)),  # nearly full rank: w2 is made, and comes first
        ((4, 4, 3, 64), None, (True, False)),  # w2 first: 3 columns are left, not 64
        ((4, 4, 64, 3), None, (False, True)),
    ],
)
def test_takes_the_cheaper_order(shape, r, sides) -> None:
    parts = Parts(*shape, r, rows=(2,))
    first, last = kron._split(parts.w1, parts.w2)
    assert (first is not None, last is not None) == sides
    torch.testing.assert_close(parts.fused(), parts.expected())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [None, 3])
def test_agrees_with_the_formula(dtype, tolerance, bias, r) -> None:
    parts = Parts(4, 6, 8, 8, r, dtype=dtype, masters=torch.float32, bias=bias, scaled=True)
    weight = torch.randn(2, 3, 32).to(dtype)
    results = []
    for function in (kron_linear, kron_linear_reference):
        out = function(parts.x, parts.store, parts.bias, parts.w1, parts.w2, 0.7, row_scale=parts.row_scale)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, parts.leaves, weight)))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours.float() - plain.float()).norm() <= tolerance * plain.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(3, 17), (1,), (2, 130)])
@pytest.mark.parametrize("shape", [(8, 12, 8, 8), (24, 24, 24, 24), (1, 4, 5, 24), (3, 1, 1, 77)])
def test_a_zero_factor_is_the_base_bitwise(dtype, bias, rows, shape) -> None:
    for zero in ("w1", "w2"):
        for r in (None, 4):
            parts = Parts(*shape, r, dtype=dtype, masters=torch.float32, bias=bias, rows=rows)
            with torch.no_grad():
                (parts.w1 if zero == "w1" else parts.leaves[-1]).zero_()
            assert torch.equal(parts.fused(), parts.layer(parts.x))


@pytest.mark.parametrize("bias", [True, False])
def test_small_updates_survive_in_bfloat16(bias) -> None:
    """An update far below the output's last place must still move the output on average, as in float32."""
    parts = Parts(16, 16, 16, 16, dtype=torch.bfloat16, masters=torch.float32, bias=bias, rows=(512,), size=6e-3)
    if bias:
        parts.bias.mul_(20)  # larger than the output itself
    base, update = parts.layer(parts.x).float(), parts.x.float() @ parts.dense().t()
    assert update.abs().mean() < base.abs().mean() * 2**-9  # below half a unit in the last place
    moved = parts.fused().float() - base
    slope = ((moved * update).sum() / update.square().sum()).item()
    assert abs(slope - 1) < 0.15
    late = (base.bfloat16() + update).bfloat16().float() - base
    assert ((late * update).sum() / update.square().sum()).item() < 0.75  # what adding to a rounded output leaves


def test_the_update_alone() -> None:
    for r in (None, 2):
        parts = Parts(r=r, scaled=True)
        ours = kron_product(parts.x, parts.w1, parts.w2, 0.7, row_scale=parts.row_scale)
        plain = parts.x @ parts.dense().t()
        torch.testing.assert_close(ours, plain)
        mine, theirs = (torch.autograd.grad(out.square().sum(), parts.leaves) for out in (ours, plain))
        torch.testing.assert_close(mine, theirs)


def test_second_derivatives_are_refused() -> None:
    parts = Parts()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(parts.fused().sum(), parts.x, create_graph=True)


@pytest.mark.parametrize("wanted", [(1,), (2,), (3,), (0,), (1, 3)])
def test_gradients_of_those_alone_that_need_one(wanted) -> None:
    parts = Parts(r=2)
    for index, leaf in enumerate(parts.leaves):
        leaf.requires_grad_(index in wanted)
    some = [parts.leaves[index] for index in wanted]
    mine, theirs = (torch.autograd.grad(out.sum(), some) for out in (parts.fused(), parts.expected()))
    torch.testing.assert_close(mine, theirs)


def test_a_base_weight_that_trains_gets_its_gradient() -> None:
    parts = Parts()
    parts.layer.requires_grad_(True)
    parts.fused().sum().backward()
    assert parts.layer.weight.grad is not None
    torch.testing.assert_close(parts.layer.weight.grad, parts.x.detach().reshape(-1, 15).sum(0).expand(8, 15))


@pytest.mark.parametrize("r", [None, 2])
def test_keeps_x_itself_and_no_copy(r) -> None:
    parts = Parts(r=r, dtype=torch.bfloat16, masters=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        parts.fused()
    assert {t.data_ptr() for t in kept if t is not None} == {leaf.data_ptr() for leaf in parts.leaves}


def test_a_remembered_product_is_made_again() -> None:
    parts = Parts()
    gate, up = (torch.randn(4, 15, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def through(gate: Tensor, up: Tensor, w1: Tensor) -> Tensor:
        return kron_linear(swiglu(gate, up), parts.store, parts.bias, w1, parts.w2, 0.7)

    assert torch.autograd.gradcheck(through, (gate, up, parts.w1))


@pytest.mark.parametrize("r", [None, 2])
def test_under_autocast_it_works_in_bfloat16(r) -> None:
    parts = Parts(r=r, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = parts.fused()
        alone = kron_product(parts.x, parts.w1, parts.w2, 0.7)
        out.sum().backward()
    assert out.dtype == alone.dtype == torch.bfloat16
    plain = parts.expected()
    assert (out.float() - plain).norm() < 0.02 * plain.norm()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in parts.leaves)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant) -> None:
    parts = Parts(r=2)
    out = checkpoint(
        lambda x: kron_linear(x, parts.store, parts.bias, parts.w1, parts.w2, 0.7), parts.x, use_reentrant=reentrant
    )
    out.sum().backward()
    theirs = torch.autograd.grad(parts.expected().sum(), parts.leaves)
    torch.testing.assert_close(tuple(leaf.grad for leaf in parts.leaves), theirs)


@pytest.mark.parametrize("r", [None, 2])
def test_compiles_without_a_break(r) -> None:
    parts = Parts(r=r, dtype=torch.float32)

    def run(x: Tensor) -> Tensor:
        return kron_linear(x, parts.store, parts.bias, parts.w1, parts.w2, 0.7) + kron_product(
            x, parts.w1, parts.w2, 0.1
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(parts.x), run(parts.x))
    mine, theirs = (torch.autograd.grad(f(parts.x).sum(), parts.w1) for f in (compiled, run))
    torch.testing.assert_close(mine, theirs)
