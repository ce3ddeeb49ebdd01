"""The lean RMS norm against transformers' own."""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from deltaw.ops.norm import rms_norm


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (x,))


def test_bitwise_forward_and_close_gradient() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        torch.manual_seed(0)
        norm = LlamaRMSNorm(64, eps=1e-5).to(dtype).requires_grad_(False)
        norm.weight.copy_(torch.randn(64))
        x = torch.randn(2, 9, 64).to(dtype).requires_grad_(True)
        weight = torch.randn(2, 9, 64).to(dtype)
        ours, theirs = rms_norm(x, norm.weight, 1e-5), norm(x)
        assert torch.equal(ours, theirs)
        (mine,), (plain,) = torch.autograd.grad(ours, x, weight), torch.autograd.grad(theirs, x, weight)
        assert (mine - plain).float().norm() <= tolerance * plain.float().norm()


def test_keeps_no_float32_copy() -> None:
    x = torch.randn(2, 9, 64).bfloat16().requires_grad_(True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, torch.ones(64).bfloat16(), 1e-5)
    wide = [t for t in kept if t.dtype == torch.float32]
    assert sum(t.numel() for t in wide) == 18  # one number a row
