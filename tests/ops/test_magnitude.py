"""DoRA's magnitude step against the plain formula, and the row norms against the dense matrix."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils.checkpoint import checkpoint

from deltaw.ops import gain, rescale, rescale_reference, row_norms, row_squares

HALVES = [torch.bfloat16, torch.float16]


def case(shape, magnitude_shape, dtype=torch.float64, bias=True, seed=0) -> Any:
    """(out, bias, m, norm); m and the norm of the size of a row's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    d = torch.Size(magnitude_shape).numel()
    values = draw(*shape), draw(d) if bias else None, *(draw(*magnitude_shape).abs() + 0.5 for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    return tuple(None if v is None else v.to(dtype if i < 2 else wide) for i, v in enumerate(values))


SHAPES = [((3, 4, 5), (5,)), ((5,), (5,)), ((2, 1), (1,)), ((2, 5, 3, 4), (1, 5, 1, 1)), ((2, 5, 3), (1, 5, 1))]


@pytest.mark.parametrize(("shape", "magnitude_shape"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_formula_and_its_derivatives(shape, magnitude_shape, bias):
    out, b, m, norm = case(shape, magnitude_shape, bias=bias)
    inputs = [t.requires_grad_() for t in (out, b, m) if t is not None]

    def run(*given):
        given = iter(given)
        return rescale(next(given), next(given) if bias else None, next(given), norm)

    shift = 0 if b is None else b.view(magnitude_shape)
    assert torch.allclose(run(*inputs), shift + m / norm * (out - shift))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.allclose(run(*inputs), rescale_reference(out, b, m, norm))


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    d=st.integers(1, 6),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_gradients_are_autograd_s_of_the_plain_formula(shape, d, bias, seed):
    out, b, m, norm = case((*shape, d), (d,), bias=bias, seed=seed)
    inputs = [t.requires_grad_() for t in (out, b, m) if t is not None]
    grads = [torch.autograd.grad(step(out, b, m, norm).sin().sum(), inputs) for step in (rescale, rescale_reference)]
    for ours, plain in zip(*grads, strict=True):
        assert torch.allclose(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("bias", [True, False])
def test_a_magnitude_that_is_the_norm_changes_no_bit(dtype, bias):
    out, b, m, _ = case((7, 9), (9,), dtype, bias)
    assert torch.equal(rescale(out, b, m, m.clone()), out)
    assert torch.equal(rescale_reference(out, b, m, m.clone()), out)
    half = m.to(dtype)  # made from the norm and rounded: still 1
    assert torch.equal(gain(half, m), torch.ones(9))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("far", [True, False])
def test_half_precision_rounds_once(dtype, bias, far):
    out, b, m, _ = case((400, 30), (30,), dtype, bias)
    factor = torch.logspace(-2, 1, 30) if far else 1 + torch.linspace(-1, 1, 30) * 2e-3  # half a unit of bfloat16
    norm = m / factor
    exact = rescale(out.double(), None if b is None else b.double(), m.double(), norm.double())
    error = (rescale(out, b, m, norm).double() - exact).abs()
    unit = torch.finfo(dtype).eps
    shift = 0 if b is None else unit / 2 * ((out - b) * (m / norm - 1)).abs()  # a bias is first taken off, and rounded
    assert (error <= 0.52 * unit * exact.abs() + shift + unit * 1e-2).all()


def test_half_precision_gradients():
    out, b, m, norm = case((256, 12), (12,), torch.bfloat16)
    inputs = [t.requires_grad_() for t in (out, b, m)]
    grads = torch.autograd.grad(rescale(out, b, m, norm), inputs, torch.ones_like(out))
    precise = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(rescale_reference(precise[0], precise[1], precise[2], norm.double()).sum(), precise)
    for ours, plain, t in zip(grads, exact, inputs, strict=True):
        assert ours.dtype == t.dtype
        assert (ours.double() - plain).abs().max() <= 0.01 * plain.abs().max()


def test_float16_gradients_of_a_scaled_loss_fit():
    out, _, m, norm = case((64, 12), (12,), torch.float16)
    grad = torch.full_like(out, 3e4)
    inputs = [t.requires_grad_() for t in (out * 10, m)]
    grads = torch.autograd.grad(rescale(inputs[0], None, inputs[1], norm), inputs, grad)
    expected = (grad.double() * inputs[0].double()).sum(0) / norm
    assert torch.isfinite(grads[1]).all()
    assert (grads[1] - expected).abs().max() <= 5e-3 * expected.abs().max()


def test_a_row_of_zeros_stays_finite():
    out, b, m, norm = case((3, 4), (4,), torch.float32)
    with torch.no_grad():
        m[1] = norm[1] = 0
        out[:, 1] = b[1]
    inputs = [t.requires_grad_() for t in (out, b, m)]
    for step in (rescale, rescale_reference):
        y = step(out, b, m, norm)
        assert torch.equal(y[:, 1], out[:, 1])
        grads = torch.autograd.grad(y.sum(), inputs)
        assert all(torch.isfinite(grad).all() for grad in grads)
        assert grads[2][1] == 0


def test_backward_keeps_the_result_and_nothing_else_of_its_size():
    out, b, m, norm = case((50, 8), (8,), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rescale(out.requires_grad_(), b, m.requires_grad_(), norm)
    assert [t.data_ptr() for t in kept if t.numel() == y.numel()] == [y.data_ptr()]


def test_a_result_that_was_changed_in_place_is_an_error_that_says_so():
    out, b, m, norm = case((3, 4), (4,), torch.float32)
    y = rescale(out.requires_grad_(), b, m.requires_grad_(), norm)
    y.relu_()
    with pytest.raises(RuntimeError, match=r"output of a DoRA layer was changed in place.*inplace=False"):
        y.sum().backward()


def test_no_second_derivative():
    out, b, m, norm = case((3, 4), (4,))
    y = rescale(out.requires_grad_(), b, m.requires_grad_(), norm)
    with pytest.raises(RuntimeError, match="Rescale has no second derivative"):
        torch.autograd.grad(y.sum(), m, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    out, b, m, norm = case((3, 4), (4,))
    out.requires_grad_(), m.requires_grad_()
    grads = []
    for run in (rescale, lambda *args: checkpoint(rescale, *args, use_reentrant=reentrant)):
        out.grad = m.grad = None
        run(out, b, m, norm).sin().sum().backward()
        grads.append((out.grad, m.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_compiles_whole():
    out, b, m, norm = case((3, 4), (4,))
    m.requires_grad_()
    compiled = torch.compile(rescale, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(run(out, b, m, norm).sin().sum(), m)[0] for run in (rescale, compiled)]
    assert torch.allclose(*grads)


# --- norms ------------------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12)),
    scaling=st.floats(-4, 4),
    size=st.floats(0, 0.5),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_norms_are_those_of_the_dense_matrix(shape, scaling, size, transposed, seed):
    out, inner, r = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator)
    weight += 0.1 * weight.sign()  # no row all but vanishes
    A, B = torch.randn(r, inner, generator=generator) / inner**0.5, torch.randn(out, r, generator=generator) * size / r
    dense = torch.linalg.vector_norm(weight.double() + scaling * B.double() @ A.double(), dim=1)
    given_as = weight.t().contiguous().t() if transposed else weight
    norms = row_norms(row_squares(given_as), given_as, A, B, scaling)
    assert norms.dtype == torch.float32
    plain = torch.linalg.vector_norm(weight.double(), dim=1)
    kept = dense > 0.3 * plain  # what cancels loses digits, as documented
    assert torch.allclose(norms.double()[kept], dense[kept], rtol=1e-5, atol=0)
    exact = row_norms(row_squares(weight.double()), weight.double(), A.double(), B.double(), scaling)
    assert torch.allclose(exact, dense, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [True, False])
def test_norms_of_a_half_precision_weight(dtype, transposed):
    """Off by a tenth of what one output is rounded by, for an update of a fifth of the weight."""
    torch.manual_seed(0)
    weight = (torch.randn(200, 300) * 0.04).to(dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    A, B = torch.randn(8, 300) * 0.05, torch.randn(200, 8) * 0.03
    assert 0.1 < (2 * B @ A).norm() / weight.float().norm() < 0.3
    dense = torch.linalg.vector_norm(weight.double() + 2 * B.double() @ A.double(), dim=1)
    norms = row_norms(row_squares(weight), weight, A, B, 2.0)
    assert norms.dtype == torch.float32
    assert ((norms - dense) / dense).abs().max() < 0.1 * torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_without_an_update_the_norm_is_the_root_of_the_squares(dtype):
    weight = torch.randn(20, 30).to(dtype)
    squares, A = row_squares(weight), torch.randn(4, 30)
    norms = row_norms(squares, weight, A, torch.zeros(20, 4), 2.0)
    assert torch.equal(norms, squares.sqrt())
    wide = torch.promote_types(dtype, torch.float32)
    assert norms.dtype == wide
    assert torch.allclose(norms, torch.linalg.vector_norm(weight.to(wide), dim=1))


def test_an_update_that_cancels_a_row_gives_no_nan():
    weight = torch.randn(6, 6)
    norms = row_norms(row_squares(weight), weight, torch.eye(6), -weight, 1.0)
    assert torch.isfinite(norms).all()
    assert (norms < 1e-2).all()
