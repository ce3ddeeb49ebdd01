"""Attention inside each of many examples against one mask over all of them, and what it keeps and leaks: nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaw.ops import packed_attention as module
from deltaw.ops.packed_attention import packed_attention, packed_attention_reference

MIXED = [40, 1, 33, 2, 2, 60, 7]


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def qkv(
    lengths: list[int], heads: int = 6, shared: int = 2, dtype: torch.dtype = torch.float32, by_token: bool = True
) -> list[Tensor]:
    """Query, key and value, in the memory order that projections have (tokens first) or that rotation leaves."""
    torch.manual_seed(0)
    t, made = sum(lengths), []
    for n, d in ((heads, 8), (shared, 8), (shared, 5)):
        x = torch.randn(1, t, n, d).transpose(1, 2) if by_token else torch.randn(1, n, t, d)
        made.append(x.to(dtype).detach().requires_grad_(True))
    return made


def results(function: object, tensors: list[Tensor], *args: object) -> list[Tensor]:
    out = function(*tensors, *args)  # type: ignore[operator]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, weight)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=9),
    st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    st.sampled_from([None, 1, 4, 100]),
    st.booleans(),
    st.sampled_from([1, 10**9, 4000]),
)
def test_equals_one_mask(
    lengths: list[int], heads: tuple[int, int], window: int | None, by_token: bool, cost: int
) -> None:
    tensors, bounds = qkv(lengths, *heads, by_token=by_token), bounds_of(lengths)
    kept, module.GROUP_COST = module.GROUP_COST, cost  # each alone, all in one group, and as it is
    module._layout.cache_clear(), module._read.cache_clear(), module._written.cache_clear()
    try:
        ours = results(packed_attention, tensors, bounds, 0.3, window)
    finally:
        module.GROUP_COST = kept
        module._layout.cache_clear(), module._read.cache_clear(), module._written.cache_clear()
    for mine, theirs in zip(ours, results(packed_attention_reference, tensors, bounds, 0.3, window), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("short", [0, 10, 35])
def test_examples_too_long_for_plain_products(short: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.SHORT, torch.float32, short)
    tensors, bounds = qkv(MIXED), bounds_of(MIXED)
    wanted = results(packed_attention_reference, tensors, bounds, 0.3, window)
    for mine, theirs in zip(results(packed_attention, tensors, bounds, 0.3, window), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_in_half_precision() -> None:
    tensors, bounds = qkv(MIXED, dtype=torch.bfloat16), bounds_of(MIXED)
    exact = results(packed_attention_reference, [x.detach().float().requires_grad_() for x in tensors], bounds, 0.3)
    for mine, wanted in zip(results(packed_attention, tensors, bounds, 0.3), exact, strict=True):
        assert (mine.float() - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("short", [5, 160])
def test_no_bit_of_an_example_depends_on_another(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.SHORT, torch.float32, short)
    bounds, tensors = bounds_of(MIXED), qkv(MIXED)
    before = results(packed_attention, tensors, bounds, 0.3)
    changed = [x.detach().clone() for x in tensors]
    for x in changed:
        x[:, :, 41:74] = torch.randn_like(x[:, :, 41:74])  # the third example
    after = results(packed_attention, [x.requires_grad_() for x in changed], bounds, 0.3)
    others = torch.ones(sum(MIXED), dtype=torch.bool)
    others[41:74] = False
    assert torch.equal(before[0][:, others], after[0][:, others])
    assert not torch.equal(before[0], after[0])
    for mine, theirs in zip(before[1:], after[1:], strict=True):
        assert torch.equal(mine[:, :, others], theirs[:, :, others])


@pytest.mark.parametrize(("place", "example"), [(8, slice(0, 9)), (11, slice(9, 12)), (16, slice(12, 17))])
def test_what_is_no_number_stays_in_its_example(place: int, example: slice) -> None:
    """Places that fill a group up repeat a token: what it holds shows in no other example, forward or backward."""
    lengths = [9, 3, 5]
    tensors, bounds = qkv(lengths), bounds_of(lengths)
    assert len(module._layout(tuple(lengths)).groups) == 1
    with torch.no_grad():
        tensors[2][:, :, place] = float("nan")
    ours = results(packed_attention, tensors, bounds, 0.3)
    others = torch.ones(17, dtype=torch.bool)
    others[example] = False
    assert ours[0][:, place].isnan().all()
    assert not ours[0][:, others].isnan().any()
    assert not any(grad[:, :, others].isnan().any() for grad in ours[1:])


def test_nothing_quadratic_is_kept_or_made() -> None:
    lengths = [50] * 20
    tensors, sizes = qkv(lengths), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        packed_attention(*tensors, bounds_of(lengths), 0.3)
    assert max(sizes) <= tensors[0].numel()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        results(packed_attention, tensors, bounds_of(lengths), 0.3)
    shapes = [shape for event in seen.events() for shape in (event.input_shapes or [])]
    assert shapes
    assert not [shape for shape in shapes if shape.count(1000) > 1]  # no (tokens, tokens)


def test_like_lengths_share_a_group_and_unlike_ones_do_not() -> None:
    groups = module._layout(tuple([20] * 30 + [19] * 4 + [300])).groups
    assert [(group.count, group.width) for group in groups] == [(1, 300), (34, 20)]


def test_there_is_no_second_derivative() -> None:
    tensors = qkv([3, 2])
    out = packed_attention(*tensors, bounds_of([3, 2]), 0.3)
    (grad,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_dropout_drops_and_keeps_examples_apart() -> None:
    tensors, bounds = qkv(MIXED), bounds_of(MIXED)
    torch.manual_seed(3)
    dropped = packed_attention(*tensors, bounds, 0.3, None, 0.5)
    assert not torch.allclose(dropped, packed_attention(*tensors, bounds, 0.3))
    gradient = torch.autograd.grad(dropped[:, 41:74].sum(), tensors[2])[0]
    assert gradient[:, :, :41].count_nonzero() == gradient[:, :, 74:].count_nonzero() == 0


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_is_the_same() -> None:
    compiled = torch.compile(packed_attention, dynamic=True, backend="aot_eager", fullgraph=True)
    for lengths in (MIXED, [5, 200], [3, 4, 5, 6]):
        tensors, bounds = qkv(lengths), bounds_of(lengths)
        wanted = results(packed_attention_reference, tensors, bounds, 0.3, 20)
        for mine, theirs in zip(results(compiled, tensors, bounds, 0.3, 20), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_what_the_compiler_is_told_is_true() -> None:
    tensors, bounds = qkv([5, 3]), bounds_of([5, 3])
    torch.library.opcheck(module._packed, (*tensors, bounds, 0.3, 0))
