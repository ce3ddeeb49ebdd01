"""The supervised-row cross entropy against PyTorch's, in all its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.ops import IGNORE, supervised_cross_entropy, supervised_cross_entropy_through
from deltaw.weights import store_of

OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"logit_scale": 2.5, "softcap": 2.0},
    {"divisor": 11},
    {"divisor": torch.tensor(7)},
]


def parts(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, nn.Linear]:
    """hidden (2, 6, 5), labels (2, 6) half of them without loss, a frozen head to 13 classes."""
    torch.manual_seed(0)
    head = nn.Linear(5, 13, bias=bias, dtype=dtype).requires_grad_(False)
    labels = torch.randint(0, 13, (2, 6))
    labels[0, :4] = labels[1, 3] = IGNORE
    return torch.randn(2, 6, 5, dtype=dtype, requires_grad=True), labels, head


def reference(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    *,
    divisor: Any = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    total = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum")
    return total / (divisor if divisor is not None else (labels != IGNORE).sum())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_rows", [None, 1, 3])
def test_value_and_gradient(options: dict[str, Any], bias: bool, chunk_rows: int | None) -> None:
    hidden, labels, head = parts(bias=bias)
    ours = supervised_cross_entropy(hidden, labels, store_of(head), head.bias, chunk_rows=chunk_rows, **options)
    plain = reference(hidden, labels, head, **options)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, hidden), torch.autograd.grad(plain, hidden))


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    hidden, labels, head = parts()
    assert torch.autograd.gradcheck(
        lambda h: supervised_cross_entropy(h, labels, store_of(head), head.bias, chunk_rows=3, **options),
        (hidden,),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    hidden, labels, head = parts(dtype)
    ours = supervised_cross_entropy(hidden, labels, store_of(head), head.bias)
    plain = reference(hidden, labels, head)
    assert ours.dtype == torch.float32
    assert abs(ours - plain).item() <= tolerance * plain.item()
    (mine,), (theirs,) = torch.autograd.grad(ours, hidden), torch.autograd.grad(plain, hidden)
    assert (mine - theirs).float().norm() <= 3 * tolerance * theirs.float().norm()


def test_backward_twice_through_one_graph() -> None:
    hidden, labels, head = parts()
    loss = supervised_cross_entropy(hidden, labels, store_of(head), head.bias)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, hidden)
    torch.testing.assert_close(2 * first, second)


def test_no_supervised_row_is_zero_with_a_zero_gradient() -> None:
    hidden, labels, head = parts()
    nothing = torch.full_like(labels, IGNORE)
    for loss in (
        supervised_cross_entropy(hidden, nothing, store_of(head), head.bias),
        supervised_cross_entropy_through(hidden, nothing, head, 13),
    ):
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, hidden)
        assert not grad.any()


def test_unsupervised_rows_never_reach_the_head() -> None:
    hidden, labels, head = parts()
    seen: list[int] = []
    head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[0]))
    supervised_cross_entropy_through(hidden, labels, head, 13)
    assert sum(seen) == int((labels != IGNORE).sum())
    poisoned = hidden.detach().clone()
    poisoned[labels == IGNORE] = float("nan")
    assert torch.isfinite(supervised_cross_entropy(poisoned, labels, store_of(head), head.bias))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_through_a_head_that_trains(options: dict[str, Any]) -> None:
    hidden, labels, head = parts()
    head.requires_grad_(True)
    wanted = (hidden, head.weight, head.bias)
    ours = supervised_cross_entropy_through(hidden, labels, head, 13, chunk_rows=3, **options)
    plain = reference(hidden, labels, head, **options)
    # float32 inside: the head's logits are widened to it
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(plain, wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_accumulated_micro_batches_equal_the_large_batch() -> None:
    hidden, labels, head = parts()
    count = (labels != IGNORE).sum()
    whole = supervised_cross_entropy(hidden, labels, store_of(head), head.bias)
    split = sum(
        supervised_cross_entropy(hidden[i : i + 1], labels[i : i + 1], store_of(head), head.bias, divisor=count)
        for i in range(2)
    )
    torch.testing.assert_close(whole, split)
