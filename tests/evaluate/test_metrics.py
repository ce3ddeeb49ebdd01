"""Shares and their intervals."""

import pytest

from deltaw.errors import DataError
from deltaw.evaluate.metrics import Score, exact_match, wilson_interval


def test_exact_match_looks_past_white_space_only():
    score = exact_match([" a  b\n", "c", "D"], ["a b", "x", "d"])
    assert (score.right, score.total) == (1, 3)
    assert score.value == pytest.approx(1 / 3)


def test_exact_match_wants_pairs():
    with pytest.raises(DataError, match="2 predictions with 1 references"):
        exact_match(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # from the closed form of Wilson (1927), z = 1.96, four places
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


def test_wilson_knows_nothing_of_nothing_and_refuses_nonsense():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 right of 2"):
        wilson_interval(3, 2)


def test_a_score_says_itself():
    assert str(Score("exact match", 8, 10)) == "exact match 80.0% (8 of 10, 95%: 49-94%)"
    assert Score("x", 1, 2).as_dict()["value"] == 0.5
