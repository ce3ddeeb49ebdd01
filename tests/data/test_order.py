"""The order of examples: a function of (seed, epoch), through accelerate's loaders, workers and shards; the waste."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from deltaw.data import EpochSampler, batch_waste
from deltaw.data.order import Order, epoch_order

ORDERS: list[Order] = ["random", "sequential", "group_by_length"]
LENGTHS = np.random.default_rng(0).integers(1, 200, 203)


def sampler(order: Order, seed: int = 0, batch_size: int = 4) -> EpochSampler:
    return EpochSampler(len(LENGTHS), order, seed, lengths=LENGTHS, batch_size=batch_size)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ORDERS), st.integers(0, 60), st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 5))
def test_every_example_once(order: Order, n: int, batch_size: int, seed: int, epoch: int) -> None:
    lengths = np.arange(n) * 7 % 13 + 1
    seen = epoch_order(n, order, seed, epoch, lengths=lengths, batch_size=batch_size)
    assert sorted(seen.tolist()) == list(range(n))


@pytest.mark.parametrize("order", ORDERS)
def test_a_function_of_seed_and_epoch_alone(order: Order) -> None:
    one, two = sampler(order), sampler(order)
    first = list(one)
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    torch.rand(7)
    state = torch.get_rng_state()
    assert list(two) == first == list(one)  # reading it again moves nothing
    assert torch.equal(state, torch.get_rng_state())
    one.set_epoch(1)
    assert (list(one) == first) == (order == "sequential")
    one.set_epoch(0)
    assert list(one) == first
    assert (list(sampler(order, seed=1)) == first) == (order == "sequential")
    assert len(one) == len(first)


def test_lengths_are_alike_in_a_batch_and_batches_are_not_in_line() -> None:
    seen = LENGTHS[list(sampler("group_by_length"))][:200].reshape(-1, 4)
    assert (seen.max(1) - seen.min(1)).mean() < 0.1 * (LENGTHS.max() - LENGTHS.min())
    assert seen[0].max() == seen.max()  # the largest batch first
    assert np.abs(np.corrcoef(np.arange(50), seen.mean(1))[0, 1]) < 0.5
    with pytest.raises(ValueError, match="lengths"):
        epoch_order(3, "group_by_length", 0, 0)


def batches(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_accelerate_s_loader_tells_it_the_epoch_and_goes_on_in_the_middle(workers: int) -> None:
    items = torch.arange(len(LENGTHS))

    def loader() -> DataLoaderShard:
        return DataLoaderShard(
            items,  # type: ignore[arg-type]
            batch_sampler=BatchSampler(sampler("random"), 4, drop_last=False),
            num_workers=workers,
        )

    whole = loader()
    epochs = [batches(whole) for _ in range(2)]  # the second iteration is the second epoch
    assert epochs[0] != epochs[1]
    for epoch, wanted in enumerate(epochs):
        resumed = skip_first_batches(loader(), 5)
        resumed.set_epoch(epoch)
        assert batches(resumed) == wanted[5:]


@pytest.mark.parametrize("order", ORDERS)
def test_shards_of_several_processes_share_out_one_order(order: Order) -> None:
    one = BatchSampler(sampler(order, batch_size=8), 4, drop_last=True)
    whole = list(one)
    parts = [list(BatchSamplerShard(one, num_processes=2, process_index=i)) for i in range(2)]
    together = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert together[: len(whole) - 1] == whole[: len(whole) - 1]


def test_waste_is_what_a_loader_s_batches_hold() -> None:
    def held(order: Order) -> float:
        loader = DataLoader(LENGTHS, batch_size=8, sampler=sampler(order, batch_size=8), collate_fn=list)  # type: ignore[arg-type]
        places = sum(max(batch) * len(batch) for batch in loader)
        return 1 - float(LENGTHS.sum()) / float(places)

    shares = batch_waste(LENGTHS, 8, 256)
    assert shares["random"] == pytest.approx(held("random"))
    assert shares["group_by_length"] == pytest.approx(held("group_by_length"))
    assert shares["padding_free"] == 0.0
    assert 0 <= shares["packing"] < 0.02 < shares["group_by_length"] < shares["random"]
    assert "packing" not in batch_waste(LENGTHS, 8)
    assert batch_waste([], 8, 256) == {}
