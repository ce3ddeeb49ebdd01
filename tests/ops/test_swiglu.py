"""SwiGLU's product against PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltaw.ops.recipe import kept, made_again
from deltaw.ops.swiglu import swiglu


def test_gradcheck() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


def test_bitwise_and_close_gradients() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        torch.manual_seed(0)
        gate, up = (torch.randn(40, 64).to(dtype).requires_grad_(True) for _ in range(2))
        ours, plain = swiglu(gate, up), F.silu(gate) * up
        assert torch.equal(ours, plain)
        weight = torch.randn(40, 64).to(dtype)
        for mine, theirs in zip(
            torch.autograd.grad(ours, (gate, up), weight),
            torch.autograd.grad(plain, (gate, up), weight),
            strict=True,
        ):
            assert (mine - theirs).float().norm() <= tolerance * theirs.float().norm()


def test_the_product_remembers_its_recipe() -> None:
    gate, up = torch.randn(4, 5), torch.randn(4, 5)
    product = swiglu(gate, up)
    recipe, inputs = kept(product)
    assert [t.data_ptr() for t in inputs] == [gate.data_ptr(), up.data_ptr()]
    assert torch.equal(made_again(recipe, inputs), product)
    plain = torch.randn(3)
    assert kept(plain) == (None, (plain,))
