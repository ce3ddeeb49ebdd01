"""What needs no language model: the larger class, and logistic regression on tf-idf. Knows nothing of files."""

from __future__ import annotations

from collections.abc import Sequence

from deltaw.errors import MissingExtra

from .data import Review

__all__ = ["majority", "tfidf"]


def majority(train: Sequence[Review], test: Sequence[Review]) -> list[int]:
    """The class that most training reviews have, for every test review."""
    larger = int(2 * sum(one.label for one in train) >= len(train))
    return [larger] * len(test)


def tfidf(train: Sequence[Review], test: Sequence[Review], least: int = 2) -> tuple[list[int], int]:
    """The label of each test review, and how many weights that took.

    Logistic regression (C = 1) on the tf-idf of words and pairs of neighbouring words.

    Args:
        train: reviews to learn from.
        test: reviews to label.
        least: training reviews that a word must occur in.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError as error:
        raise MissingExtra("sklearn", "reviews", "the baseline of the film reviews") from error
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=least, sublinear_tf=True, token_pattern=r"[a-z0-9]+(?:'[a-z]+)?")
    model = make_pipeline(words, LogisticRegression(C=1.0, max_iter=1000))
    model.fit([one.text for one in train], [one.label for one in train])
    answers = [int(label) for label in model.predict([one.text for one in test])]
    return answers, len(words.vocabulary_) + 1
