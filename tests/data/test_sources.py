import hypothesis.strategies as st
import pytest
from hypothesis import given

from deltaw.data import mix
from deltaw.errors import DataError


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    total=st.integers(0, 200),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_shares_are_kept_and_no_row_comes_twice_before_all_have_come(sizes, total, seed, data):
    weights = [data.draw(st.floats(0.01, 10)) for _ in sizes]
    sources = [[(i, j) for j in range(size)] for i, size in enumerate(sizes)]
    rows, drawn = mix(sources, weights, total=total, seed=seed)
    assert len(rows) == total == sum(one.draws for one in drawn)
    for i, (source, one) in enumerate(zip(sources, drawn, strict=True)):
        assert abs(one.draws - weights[i] / sum(weights) * total) < 1
        counts = [rows.count(row) for row in source]
        assert sum(counts) == one.draws
        assert max(counts) - min(counts) <= 1
    assert (rows, drawn) == mix(sources, weights, total=total, seed=seed)


def test_the_order_is_mixed_and_follows_the_seed():
    sources = [["a"] * 50, ["b"] * 50]
    rows, drawn = mix(sources, [1, 1], names=["a.jsonl", "b.jsonl"], seed=1)
    assert {"a", "b"} == set(rows[:10]) == set(rows[-10:])
    assert rows != mix(sources, [1, 1], seed=2)[0]
    assert [str(one) for one in drawn] == ["a.jsonl: 50 of 50 rows", "b.jsonl: 50 of 50 rows"]


def test_what_repeats_is_told():
    _, drawn = mix([list(range(10)), list(range(90))], [3, 1], names=["small", "large"])
    assert [str(one) for one in drawn] == ["small: 75 draws from 10 rows (7.50 passes)", "large: 25 of 90 rows"]


@pytest.mark.parametrize(
    ("sources", "weights", "match"),
    [
        ([[1]], [1, 2], "as many weights"),
        ([[1], [2]], [1, 0], "above 0"),
        ([[1], [2]], [1, float("nan")], "above 0"),
        ([[1], []], [1, 1], r"from \['source 2'\]: no rows"),
    ],
)
def test_what_cannot_be_mixed(sources, weights, match):
    with pytest.raises(DataError, match=match):
        mix(sources, weights)
