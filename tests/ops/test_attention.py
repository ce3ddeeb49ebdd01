"""Matrix-product attention against PyTorch's, and when transformers is given which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.ops import attention
from deltaw.ops.attention import ATTENTION, causal_attention


def qkv(dtype: torch.dtype = torch.float64, heads: int = 4, shared: int = 2, t: int = 7) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, h, t, 8, dtype=torch.float64).to(dtype).requires_grad_(True) for h in (heads, shared, shared)
    ]


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 1)])
def test_gradcheck(heads: int, shared: int) -> None:
    assert torch.autograd.gradcheck(
        lambda q, k, v: causal_attention(q, k, v, 0.3), qkv(heads=heads, shared=shared, t=4)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("t", [1, 2, 33])
def test_agrees_with_sdpa(dtype: torch.dtype, tolerance: float, t: int) -> None:
    q, k, v = qkv(dtype, t=t)
    weight = torch.randn(2, 4, t, 8).to(dtype)
    ours = causal_attention(q, k, v, 0.3)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    results = [(out, *torch.autograd.grad(out, (q, k, v), weight)) for out in (ours, plain)]
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).float().norm() <= tolerance * theirs.float().norm() + 1e-6


def test_keeps_nothing_quadratic_in_the_length() -> None:
    q, k, v = qkv(t=50)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        causal_attention(q, k, v, 0.3)
    assert max(sizes) <= q.numel()


@pytest.mark.parametrize(
    ("what", "plain"),
    [
        ({}, True),
        ({"attention_mask": torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()}, False),
        ({"dropout": 0.1}, False),
        ({"is_causal": False}, False),
    ],
)
def test_only_what_it_does_faster_is_taken(what: dict[str, Any], plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", lambda *a: taken.append(1) or real(*a))
    q, k, v = (t.float() for t in qkv())
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # type: ignore[assignment]
    mask = what.pop("attention_mask", None)
    out, _ = attention._forward(module, q, k, v, mask, **what)
    assert bool(taken) == plain
    assert out.shape == (2, 7, 4, 8)
    with torch.no_grad():
        taken.clear()
        attention._forward(module, q, k, v, None)
        assert not taken  # without a graph sdpa is as good


def test_transformers_knows_it() -> None:
    from transformers import AttentionInterface

    assert ATTENTION in AttentionInterface()
