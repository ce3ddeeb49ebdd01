import random
from itertools import combinations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deltaw.data import Row, split_rows
from deltaw.data import split as module
from deltaw.errors import DataError


def rows_of(sizes):
    rows = [{"film": f"f{i}", "n": j} for i, size in enumerate(sizes) for j in range(size)]
    random.Random(0).shuffle(rows)
    return rows


@given(n=st.integers(2, 200), share=st.floats(0.001, 0.999), seed=st.integers(0, 9))
def test_a_share_is_held_out_by_the_seed(n, share, seed):
    rows = [{"i": i} for i in range(n)]
    split = split_rows(rows, share, seed=seed)
    assert sorted(split.train + split.held_out) == list(range(n))
    assert split.train
    assert split.held_out
    assert abs(len(split.held_out) - share * n) <= 1
    assert split == split_rows(rows, share, seed=seed)


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=9), share=st.floats(0.05, 0.95), seed=st.integers(0, 9))
def test_no_group_is_divided_and_no_choice_of_groups_comes_closer(sizes, share, seed):
    rows = rows_of(sizes)
    split = split_rows(rows, share, seed=seed, group_column="film")
    assert sorted(split.train + split.held_out) == list(range(len(rows)))
    sides = [{rows[i]["film"] for i in side} for side in (split.train, split.held_out)]
    assert not sides[0] & sides[1]
    assert sides[0]
    assert sides[1]
    wanted = min(max(1, round(share * len(rows))), len(rows) - 1)
    best = min(abs(sum(choice) - wanted) for count in range(1, len(sizes)) for choice in combinations(sizes, count))
    assert abs(len(split.held_out) - wanted) == best


@pytest.mark.parametrize("window", [4, 64])
def test_large_sets_come_as_close(monkeypatch, window):
    """The first groups are taken blindly, the rest exactly."""
    monkeypatch.setattr(module, "_WINDOW", window)
    draw = random.Random(1)
    sizes = [draw.randint(1, 30) for _ in range(400)] + [900]
    rows = rows_of(sizes)
    split = split_rows(rows, 0.2, group_column="film")
    assert len(split.held_out) == round(0.2 * len(rows))
    assert not {rows[i]["film"] for i in split.train} & {rows[i]["film"] for i in split.held_out}


def test_the_seed_chooses_the_groups_and_all_is_told():
    rows = rows_of([5] * 20)
    chosen = {tuple(split_rows(rows, 0.2, seed=seed, group_column="film").held_out) for seed in range(10)}
    assert len(chosen) > 5
    told = split_rows(rows, 0.2, group_column="film").told
    assert told == "held out 20 of 100 rows (20.0%, asked 20.0%): 4 of 20 values of 'film', none of them on both sides"
    assert split_rows(rows_of([99, 1, 300]), 0.5, group_column="film").held_out
    uneven = split_rows(rows_of([90, 10]), 0.5, group_column="film")
    assert "(10.0%, asked 50.0%)" in uneven.told or "(90.0%, asked 50.0%)" in uneven.told


@pytest.mark.parametrize(
    ("rows", "column", "match"),
    [
        ([{"film": "a"}, {"film": "b"}], "flim", "did you mean 'film'"),
        ([{"film": "a"}, {"film": "a"}], "film", "all rows have the same film"),
        ([{"film": "a"}, {"film": None}, {}, {"film": ""}], "film", r"empty in 3 of 4 rows \(row 1, row 2, row 3\)"),
        ([Row({"film": "a"}, "x.csv", 2), Row({"film": None}, "x.csv", 3)], "film", r"x\.csv:3"),
        ([{"film": float("nan")}, {"film": 1}], "film", "empty in 1 of 2"),
        ([{"film": ["a"]}, {"film": "b"}], "film", "row 0: film is a list"),
        ([{"film": "a"}], "film", "cannot be split"),
    ],
)
def test_what_cannot_be_split(rows, column, match):
    with pytest.raises(DataError, match=match):
        split_rows(rows, 0.5, group_column=column)
