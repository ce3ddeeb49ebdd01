"""One vectorized pass over tokens, held against a plain loop over examples."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import deltaw.data.check_facts as check_facts
from deltaw.data import IGNORE, Rendered, TokenDataset
from deltaw.data.check_facts import Vocabulary, facts_of

WORDS = Vocabulary(stops=[1], special=[0, 1, 2], blank=[0, 1, 2, 3], bos=0)
examples = st.lists(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=8), max_size=6)


def dataset_of(made, rows=None):
    return TokenDataset.of(
        [Rendered([id_ for id_, _ in one], [id_ if on else IGNORE for id_, on in one], len(one)) for one in made], rows
    )


def runs_of(one):
    """(start, end) of each stretch of learned tokens."""
    found, start = [], None
    for i, (_, on) in enumerate([*one, (0, False)]):
        if on and start is None:
            start = i
        if not on and start is not None:
            found.append((start, i))
            start = None
    return found


@pytest.mark.parametrize("at_once", [1, 5, 1 << 20])
@given(made=examples)
def test_facts_are_those_of_a_plain_loop(at_once, made):
    before, check_facts._AT_ONCE = check_facts._AT_ONCE, at_once
    try:
        facts = facts_of(dataset_of(made), WORDS)
    finally:
        check_facts._AT_ONCE = before
    for i, one in enumerate(made):
        ids, runs = [id_ for id_, _ in one], runs_of(one)
        ends = [ids[end - 1] for _, end in runs]
        assert facts.lengths[i] == len(one)
        assert facts.supervised[i] == sum(on for _, on in one)
        assert facts.runs[i] == len(runs)
        assert facts.open_runs[i] == sum(end not in WORDS.special for end in ends)
        assert facts.odd_runs[i] == sum(end in (0, 2) for end in ends)
        assert facts.empty_runs[i] == sum(all(id_ in WORDS.blank for id_ in ids[a:b]) for a, b in runs)
        assert facts.prompt_length[i] == (runs[-1][0] if runs else len(one))
        assert facts.bos[i] == (0 if ids[:1] != [0] else 2 if ids[1:2] == [0] else 1)
        if one:
            assert (facts.lowest[i], facts.highest[i]) == (min(ids), max(ids))
    # equal parts, and only those, have equal hashes
    for part in ("whole", "prompt", "answer"):
        texts = []
        for one in made:
            ids, runs = tuple(id_ for id_, _ in one), runs_of(one)
            cut = runs[-1][0] if runs else len(one)
            last = runs[-1][1] if runs else len(one)
            texts.append({"whole": ids, "prompt": ids[:cut], "answer": ids[cut:last]}[part])
        hashes = getattr(facts, part).tolist()
        for i in range(len(made)):
            for j in range(i):
                assert (texts[i] == texts[j]) == (hashes[i] == hashes[j]), (part, texts[i], texts[j])


def test_an_answer_that_goes_on_in_another_block_or_was_cut_is_no_open_end():
    made = [[(4, True), (5, True)], [(5, True), (1, True)]]
    assert facts_of(dataset_of(made, rows=[7, 7]), WORDS).open_runs.tolist() == [0, 0]
    assert facts_of(dataset_of(made, rows=[7, 8]), WORDS).open_runs.tolist() == [1, 0]
    cut = TokenDataset.of([Rendered([4, 5], [4, 5], 9, 3)])
    assert facts_of(cut, WORDS).open_runs.tolist() == [0]


def test_ids_of_any_size_are_looked_at():
    facts = facts_of(dataset_of([[(4, True), (2_000_000_000, True)]]), WORDS)
    assert facts.highest.tolist() == [2_000_000_000]
    assert facts.open_runs.tolist() == [1]
    negative = TokenDataset.of([Rendered([-5, 1], [IGNORE, 1], 2)])
    assert facts_of(negative, WORDS).lowest.tolist() == [-5]


def test_nothing_gives_nothing():
    assert len(facts_of(TokenDataset.of([]), WORDS).whole) == 0
    assert facts_of(dataset_of([[]]), WORDS).lengths.dtype == np.int64
