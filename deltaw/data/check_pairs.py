"""Findings about examples held against each other: repeated, contradicting, all alike, on both sides of the split.

Works on hashes, so it costs a sort. Knows nothing of texts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deltaw.data.check_facts import Facts
from deltaw.data.check_masks import some
from deltaw.data.check_report import Finding
from deltaw.data.tokens import TokenDataset

__all__ = ["overlapping", "pair_findings", "repeated", "split_findings"]

_MANY_REPEATED = 0.05  # share of repeated examples from which it is more than worth knowing
_MUCH_OVERLAP = 0.05  # share of the evaluation examples from which their loss cannot be believed
_CONSTANT = 0.9  # share of the answers that are one and the same
_FEW = 20  # examples below which a share says nothing


def repeated(facts: Facts) -> np.ndarray:
    """(n,) bool: the same tokens stand in an earlier example."""
    later = np.ones(len(facts.whole), bool)
    later[np.unique(facts.whole, return_index=True)[1]] = False
    return later & (facts.lengths > 0)


def overlapping(facts: Facts, train: Facts) -> np.ndarray:
    """(n,) bool: evaluation examples whose tokens are those of a training example."""
    return np.isin(facts.whole, train.whole) & (facts.lengths > 0)


def pair_findings(dataset: TokenDataset, facts: Facts, *, where: str) -> Iterator[Finding]:
    """Findings within one data set."""
    n = len(dataset)
    if not n:
        return
    again = repeated(facts)
    level = "warning" if again.sum() >= _MANY_REPEATED * n else "note"
    yield from some("duplicates", again, dataset, "repeat an earlier one", where=where, level=level)

    asked = _asked(facts)
    with np.errstate(over="ignore"):
        pairs = facts.prompt * np.uint64(0x9E3779B97F4A7C15) + facts.answer
    _, first = np.unique(pairs[asked], return_index=True)
    prompts, answers = np.unique(facts.prompt[asked][first], return_counts=True)
    torn = asked & np.isin(facts.prompt, prompts[answers > 1])
    said = f"share a prompt with another answer ({int((answers > 1).sum()):,} prompts)"
    yield from some("conflicting-answers", torn, dataset, said, where=where)

    if asked.sum() >= _FEW:
        kinds, counts = np.unique(facts.answer[asked], return_counts=True)
        most = counts.argmax()
        if counts[most] >= _CONSTANT * asked.sum():
            alike = asked & (facts.answer == kinds[most])
            yield from some("constant-answers", alike, dataset, "have one and the same answer", where=where)


def split_findings(dataset: TokenDataset, facts: Facts, train: Facts) -> Iterator[Finding]:
    """Findings about the evaluation examples, held against the training examples."""
    n = len(dataset)
    if not n:
        return
    both = overlapping(facts, train)
    level = "error" if both.sum() >= _MUCH_OVERLAP * n else "warning"
    yield from some("train-eval-overlap", both, dataset, "are training examples too", where="eval", level=level)
    near = _asked(facts) & ~both & np.isin(facts.prompt, train.prompt[_asked(train)])
    said = "have the prompt of a training example, with another answer"
    yield from some("train-eval-same-prompt", near, dataset, said, where="eval")
    if n < _FEW:
        yield Finding.of("few-eval-examples", f"there are {n} evaluation examples", where="eval")


def _asked(facts: Facts) -> np.ndarray:
    """(n,) bool: there is a prompt and an answer to it; plain text has neither."""
    return (facts.supervised > 0) & (facts.prompt_length > 1)
