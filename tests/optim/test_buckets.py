"""Parameters brought together: which share a bucket, where their states lie, and what one call updates."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deltaw.optim.buckets import CHUNK, Bucket, Scratch, pack
from deltaw.optim.memory import PlainMemory
from deltaw.optim.update import BLOCKSIZE

CHUNK_ = CHUNK["cpu"]


def bucket_of(sizes: list[int], bits: int) -> Bucket:
    params = [nn.Parameter(torch.ones(size)) for size in sizes]
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    bucket = Bucket([*params], bits, PlainMemory(torch.device("cpu")))
    bucket.fill(bucket.memory.zeros(bucket.specs()))
    return bucket


@given(st.lists(st.integers(0, 2 * CHUNK_), max_size=12))
def test_small_parameters_share_a_bucket_in_their_order(sizes: list[int]) -> None:
    params = [torch.empty(size, device="meta") for size in sizes]
    packed = list(pack(params))
    assert [id(param) for some in packed for param in some] == [id(param) for param in params]
    assert all(len(some) == 1 or sum(param.numel() for param in some) <= CHUNK_ for some in packed)
    for some, following in pairwise(packed):  # the next one would not have fitted in
        padded = sum(-(-param.numel() // BLOCKSIZE) * BLOCKSIZE for param in some)
        assert padded + following[0].numel() > CHUNK_


def test_each_parameter_begins_a_block_of_its_own() -> None:
    bucket = bucket_of([300, 1, 256, 5], 8)
    assert bucket.starts == [0, 512, 768, 1024]
    first, second, third, last = (bucket.states_of(i) for i in range(4))
    assert [state["exp_avg"].numel() for state in (first, second, third, last)] == [300, 1, 256, 5]
    assert [state["exp_avg_absmax"].numel() for state in (first, second, third, last)] == [2, 1, 1, 1]
    second["exp_avg_absmax"].fill_(7)
    assert bucket.states["exp_avg_absmax"].tolist() == [0, 0, 7, 0, 0]


def test_one_call_updates_all_unless_some_wait() -> None:
    bucket = bucket_of([300, 5], 8)
    one, other = bucket.params
    (piece,) = bucket.pieces({one: 3, other: 3}, {})
    assert piece.params == bucket.params
    assert (piece.begin, piece.end, piece.step) == (0, 768, 3)
    assert [state.numel() for state in piece.states] == [768, 3, 768, 3]
    apart = list(bucket.pieces({one: 3, other: 1}, {}))
    assert [(piece.begin, piece.end, piece.step) for piece in apart] == [(0, 300, 3), (0, 5, 1)]
    assert [[state.numel() for state in piece.states] for piece in apart] == [[300, 2, 300, 2], [5, 1, 5, 1]]
    (alone,) = bucket.pieces({other: 2}, {})
    assert alone.params == [other]
    assert not list(bucket.pieces({}, {}))


def test_a_large_parameter_is_cut_into_chunks() -> None:
    bucket = bucket_of([2 * CHUNK_ + 10], 8)
    pieces = list(bucket.pieces({bucket.params[0]: 1}, {}))
    assert [(piece.begin, piece.end) for piece in pieces] == [
        (0, CHUNK_),
        (CHUNK_, 2 * CHUNK_),
        (2 * CHUNK_, 2 * CHUNK_ + 10),
    ]
    assert sum(piece.states[1].numel() for piece in pieces) == bucket.states["exp_avg_absmax"].numel()


def test_gathering_leaves_zeros_between() -> None:
    bucket, scratch = bucket_of([300, 5], 8), Scratch()
    (piece,) = bucket.pieces(dict.fromkeys(bucket.params, 1), {})
    scratch.gather(piece)
    scratch.grads.fill_(9)  # what another bucket left behind
    values, grads, values_of, grads_of = scratch.gather(piece)
    assert torch.equal(values_of[1], torch.ones(5))
    assert torch.equal(grads_of[0], torch.full((300,), 2.0))
    assert grads[300:512].tolist() == [0.0] * 212
    assert values.data_ptr() == values_of[0].data_ptr()
