"""Lengths and what follows from them."""

from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from deltaw.data import CheckReport
from deltaw.data.check_counts import Training, count_lengths, histogram, steps_of, training_findings


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_every_example_is_in_one_bar(lengths):
    bars = histogram(np.array(lengths))
    assert len(bars) <= 20
    assert sum(count for _, _, count in bars) == len(lengths)
    for (_, end, _), (start, _, _) in pairwise(bars):
        assert start == end + 1
    for low, high, count in bars:
        assert count == sum(low <= length <= high for length in lengths)
    assert bars[0][0] == min(lengths)


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        (Training(8, 1, 3.0), 3 * 13),
        (Training(8, 4, 1.0), 4),
        (Training(8, 1, 3.0, max_steps=7), 7),
        (Training(8, 1), 0),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(training, steps):
    assert steps_of(100, training) == steps


def test_waste_is_told_for_the_way_that_batches_are_made():
    lengths = np.array([10, 100] * 50)
    plain, grouped = CheckReport(examples=100), CheckReport(examples=100)
    count_lengths(plain, lengths, Training(4), 128)
    count_lengths(grouped, lengths, Training(4, group_by_length=True), 128)
    assert plain.padding_waste > 0.3 > grouped.padding_waste
    assert set(plain.waste) >= {"random", "group_by_length", "packing"}
    assert [finding.name for finding in training_findings(plain, Training(4))] == ["padding-waste"]
    assert list(training_findings(grouped, Training(4, group_by_length=True))) == []
    assert list(training_findings(CheckReport(), Training(4))) == []
