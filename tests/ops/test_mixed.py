"""The fused linear of a mixed batch against the plain formula: values, gradients, bits, precision, what it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltaw.ops import Update, lowrank_linear, mixed_linear, mixed_linear_reference
from deltaw.ops.lowrank import keep_mask
from deltaw.ops.swiglu import swiglu
from deltaw.weights import DenseStore, store_of

EQUAL = [(1, 0), (1, 1), (1, None), (1, 0)]
UNEQUAL = [(2, 1), (1, None), (3, 0), (1, 1)]


def parts(
    runs: list[tuple[int, int | None]] = EQUAL,
    dtype: torch.dtype = torch.float64,
    *,
    masters: torch.dtype | None = None,
    bias: bool = True,
    ranks: tuple[int, ...] = (3, 3),
    scalings: tuple[float, ...] = (0.7, -1.5),
    dropouts: tuple[float, ...] = (0.0, 0.0),
    tokens: tuple[int, ...] = (2,),
) -> tuple[Tensor, DenseStore, Tensor | None, list[Update]]:
    """x (n, ..., 6), W (7, 6), bias (7,), updates of A (r, 6), B (7, r)."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 7, bias=bias, dtype=dtype).requires_grad_(False)
    masters = masters or dtype
    x = torch.randn(sum(n for n, _ in runs), *tokens, 6, dtype=dtype, requires_grad=True)
    updates = [
        Update(
            torch.randn(r, 6, dtype=masters, requires_grad=True),
            torch.randn(7, r, dtype=masters, requires_grad=True),
            s,
            p,
        )
        for r, s, p in zip(ranks, scalings, dropouts, strict=True)
    ]
    return x, store_of(layer), layer.bias, updates  # type: ignore[return-value]


def leaves(x: Tensor, updates: list[Update]) -> list[Tensor]:
    return [x, *(factor for update in updates for factor in (update.A, update.B))]


@pytest.mark.parametrize("runs", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [(3, 3), (1, 4)])
def test_gradcheck(runs: list, bias: bool, ranks: tuple[int, int]) -> None:
    x, store, b, updates = parts(runs, bias=bias, ranks=ranks)

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        given = [u._replace(A=A, B=B) for u, A, B in zip(updates, factors[::2], factors[1::2], strict=True)]
        return mixed_linear(x, store, b, given, runs)

    assert torch.autograd.gradcheck(run, tuple(leaves(x, updates)))


def test_gradcheck_of_a_bias_that_trains() -> None:
    x, store, b, updates = parts()
    assert b is not None
    bias = b.detach().clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda bias: mixed_linear(x, store, bias, updates, EQUAL), (bias,))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[tuple[int, int | None]], tuple[int, ...], bool, tuple[int, ...]]:
    ranks = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    owner = st.one_of(st.none(), st.integers(0, len(ranks) - 1))
    runs = draw(st.lists(st.tuples(st.integers(1, 3), owner), min_size=1, max_size=6))
    return runs, ranks, draw(st.booleans()), tuple(draw(st.lists(st.integers(1, 3), max_size=2)))


@given(batches())
def test_agrees_with_the_formula_for_any_runs(batch: tuple) -> None:
    runs, ranks, bias, tokens = batch
    x, store, b, updates = parts(
        runs,
        bias=bias,
        ranks=ranks,
        scalings=(0.7, -1.5, 2.0)[: len(ranks)],
        dropouts=(0.0,) * len(ranks),
        tokens=tokens,
    )
    results = []
    for function in (mixed_linear, mixed_linear_reference):
        out = function(x, store, b, updates, runs)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, leaves(x, updates), weight, allow_unused=True)))
    for ours, plain in zip(*results, strict=True):
        if plain is None or ours is None:  # an update without rows
            assert not any(bool(g.any()) for g in (ours, plain) if g is not None)
        else:
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("runs", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_agrees_with_the_formula_in_every_dtype(dtype: torch.dtype, tolerance: float, bias: bool, runs: list) -> None:
    x, store, b, updates = parts(runs, dtype, masters=torch.float32, bias=bias, ranks=(2, 4))
    weight = torch.randn(*x.shape[:-1], 7).to(dtype)
    results = []
    for function in (mixed_linear, mixed_linear_reference):
        out = function(x, store, b, updates, runs)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, leaves(x, updates), weight)))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours.float() - plain.float()).norm() <= tolerance * plain.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("runs", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize(("width", "tokens"), [(96, 17), (576, 128), (64, 1)])
def test_rows_without_an_update_are_the_base_bitwise(
    dtype: torch.dtype, bias: bool, runs: list, width: int, tokens: int
) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(width, 40, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(sum(n for n, _ in runs), tokens, width).to(dtype)
    updates = [Update(torch.randn(8, width), torch.randn(40, 8), 2.0) for _ in range(2)]
    out, base = mixed_linear(x, store_of(layer), layer.bias, updates, runs), layer(x)
    start = 0
    for n, owner in runs:
        same = torch.equal(out[start : start + n], base[start : start + n])
        assert same == (owner is None)
        start += n


def test_rows_without_an_update_stay_clean_of_what_is_not_finite() -> None:
    x, store, b, updates = parts(bias=False)
    with torch.no_grad():
        x[2, 0, 0] = torch.inf
        expected = x @ store.dequantize().t()
        out = mixed_linear(x, store, b, updates, EQUAL)
    assert torch.equal(out[2].nan_to_num(), expected[2].nan_to_num())
    assert torch.equal(out[2].isnan(), expected[2].isnan())


@pytest.mark.parametrize("bias", [True, False])
def test_small_updates_survive_in_bfloat16(bias: bool) -> None:
    """As for one adapter: what is far below the output's last place must still move the output on average."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 256, 256).bfloat16()
    updates = [Update(torch.randn(8, 256) / 16, torch.randn(256, 8) * 1e-4, 1.0) for _ in range(2)]
    base = layer(x).float()
    wanted = torch.stack([(x[i].float() @ u.A.t()) @ u.B.t() for i, u in enumerate(updates)])
    assert wanted.abs().mean() < base.abs().mean() * 2**-9
    moved = mixed_linear(x, store_of(layer), layer.bias, updates, [(1, 0), (1, 1)]).float() - base
    slope = ((moved * wanted).sum() / wanted.square().sum()).item()
    assert abs(slope - 1) < 0.15


@pytest.mark.parametrize("dropouts", [(0.4, 0.4), (0.4, 0.0), (0.2, 0.6)])
@pytest.mark.parametrize("runs", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_dropout_is_each_updates_own(dropouts: tuple[float, float], runs: list) -> None:
    x, store, b, updates = parts(runs, dropouts=dropouts)
    torch.manual_seed(7)
    ours = mixed_linear(x, store, b, updates, runs)
    torch.manual_seed(7)
    pieces = x.split([n for n, _ in runs])
    if dropouts[0] == dropouts[1]:
        masks = list(keep_mask(x, dropouts[0]).split([n for n, _ in runs]))
    else:
        masks = [
            keep_mask(piece, updates[o].dropout)
            if o is not None and updates[o].dropout
            else torch.ones(piece.shape, dtype=torch.bool)
            for piece, (_, o) in zip(pieces, runs, strict=True)
        ]
    plain = []
    for piece, mask, (_, o) in zip(pieces, masks, runs, strict=True):
        out = piece @ store.dequantize().t() + b
        if o is not None:
            A, B, s, p = updates[o]
            out = out + s * (piece * mask / (1 - p)) @ A.t() @ B.t()
        plain.append(out)
    expected = torch.cat(plain)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    mine, theirs = (torch.autograd.grad(out, leaves(x, updates), weight) for out in (ours, expected))
    torch.testing.assert_close(mine, theirs)


def test_one_update_for_all_is_the_single_operation() -> None:
    x, store, b, updates = parts([(4, 0)], torch.float32)
    single = lowrank_linear(x, store, b, updates[0].A, updates[0].B, updates[0].scaling)
    torch.testing.assert_close(mixed_linear(x, store, b, updates[:1], [(4, 0)]), single)


def test_only_what_trains_gets_a_gradient() -> None:
    x, store, b, updates = parts()
    frozen = [updates[0], updates[1]._replace(A=updates[1].A.detach(), B=updates[1].B.detach())]
    out = mixed_linear(x.detach(), store, b, frozen, EQUAL)
    out.sum().backward()
    plain = torch.autograd.grad(mixed_linear_reference(x, store, b, updates, EQUAL).sum(), leaves(x, updates)[1:3])
    torch.testing.assert_close((updates[0].A.grad, updates[0].B.grad), plain)
    assert updates[1].A.grad is None


def test_second_derivatives_are_refused() -> None:
    x, store, b, updates = parts()
    out = mixed_linear(x, store, b, updates, EQUAL)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_a_base_weight_that_trains_gets_its_gradient() -> None:
    x, _, _, updates = parts()
    layer = nn.Linear(6, 7, dtype=torch.float64)
    mixed_linear(x, store_of(layer), layer.bias, updates, EQUAL).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.detach().reshape(-1, 6).sum(0).expand(7, 6))


def test_keeps_x_itself_and_no_copy() -> None:
    x, store, b, updates = parts(dtype=torch.bfloat16, masters=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mixed_linear(x, store, b, updates, EQUAL)
    known = {t.data_ptr() for t in leaves(x, updates)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in known] == [(8, 3)]  # only x A^T


def test_a_remembered_product_is_made_again() -> None:
    _, store, b, updates = parts()
    gate, up = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda gate, up: mixed_linear(swiglu(gate, up), store, b, updates, EQUAL), (gate, up)
    )
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        product = swiglu(gate, up)
        mixed_linear(product, store, b, updates, EQUAL)
    assert product.data_ptr() not in kept


def test_under_autocast_it_works_in_bfloat16() -> None:
    x, store, b, updates = parts(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixed_linear(x, store, b, updates, EQUAL)
    plain = mixed_linear_reference(x, store, b, updates, EQUAL)
    assert out.dtype == torch.bfloat16
    assert (out.float() - plain).norm() < 0.02 * plain.norm()
    out.sum().backward()
    assert {t.grad.dtype for t in leaves(x, updates) if t.grad is not None} == {torch.float32}


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant: bool) -> None:
    x, store, b, updates = parts(dropouts=(0.3, 0.1))
    results = []
    for wrap in (False, True):
        torch.manual_seed(3)
        run = lambda x: mixed_linear(x, store, b, updates, EQUAL)  # noqa: E731
        out = checkpoint(run, x, use_reentrant=reentrant) if wrap else run(x)
        for leaf in leaves(x, updates):
            leaf.grad = None
        out.sum().backward()
        results.append([leaf.grad for leaf in leaves(x, updates)])
    torch.testing.assert_close(*results)


def test_rows_of_a_strided_input_and_an_expanded_gradient() -> None:
    x, store, b, updates = parts(tokens=(5,))
    last = x[:, -1:, :]  # not contiguous, as the last token of each row is
    ours, plain = (f(last, store, b, updates, EQUAL) for f in (mixed_linear, mixed_linear_reference))
    torch.testing.assert_close(ours, plain)
    mine, theirs = (torch.autograd.grad(out.sum(), leaves(x, updates)) for out in (ours, plain))
    torch.testing.assert_close(mine, theirs)


def test_an_empty_sequence() -> None:
    x, store, b, updates = parts(tokens=(0,))
    assert mixed_linear(x, store, b, updates, EQUAL).shape == (4, 0, 7)


def test_compiles_without_a_break() -> None:
    x, store, b, updates = parts(dtype=torch.float32)
    compiled = torch.compile(lambda x: mixed_linear(x, store, b, updates, EQUAL), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixed_linear(x, store, b, updates, EQUAL))
    (mine,) = torch.autograd.grad(compiled(x).sum(), updates[0].A)
    (theirs,) = torch.autograd.grad(mixed_linear(x, store, b, updates, EQUAL).sum(), updates[0].A)
    torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


def test_a_bias_that_trains_gets_its_gradient_in_the_precision_of_the_batch():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3, dtype=torch.float64), torch.randn(4, 6, 5, dtype=torch.float64)
    layer.weight.requires_grad_(False)
    update = Update(torch.randn(2, 5, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64), 0.5)
    runs = [(1, None), (3, 0)]
    pulls = []
    for function in (mixed_linear, mixed_linear_reference):
        out = function(x, store_of(layer), layer.bias, [update], runs)
        pulls.append(torch.autograd.grad(out.pow(3).sum(), layer.bias)[0])
    torch.testing.assert_close(*pulls, rtol=1e-12, atol=1e-12)
