"""The stage that stops a run before it wastes hours: counts, problems and notes about rendered examples.

Knows nothing of models. It looks at nothing but ids and labels, so it also finds the faults of a renderer.
A problem means that training would quietly teach the wrong thing; a note is worth knowing and stops nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaw.data.render import IGNORE, Rendered, RenderSettings, stop_token_ids
from deltaw.errors import DataError

__all__ = ["CheckReport", "check_rendered", "preview"]

SHOWN_ROWS = 5


@dataclass
class CheckReport:
    """What `check_rendered` found. Lengths are in tokens, after truncation."""

    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    length_min: int = 0
    length_median: int = 0
    length_p95: int = 0
    length_max: int = 0
    truncated: int = 0
    truncated_supervised: int = 0  # examples that lost supervised tokens
    duplicates: int = 0
    overlap: int = 0  # evaluation examples that are also training examples
    padding_waste: float = 0.0  # share of a shuffled batch's places that hold padding
    batch_size: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_if_bad(self) -> None:
        """Raises DataError with all problems at once, if there are any."""
        if self.problems:
            lines = "\n  ".join(self.problems)
            raise DataError(f"the data has {len(self.problems)} problem(s):\n  {lines}")

    def __str__(self) -> str:
        share = self.supervised_tokens / self.tokens if self.tokens else 0.0
        lines = [
            f"{self.examples:,} examples, {self.tokens:,} tokens, {self.supervised_tokens:,} supervised ({share:.0%})",
            f"length: min {self.length_min}, median {self.length_median}, 95% {self.length_p95}, max {self.length_max}",
            f"truncated: {self.truncated}, cutting supervised text: {self.truncated_supervised}",
            f"duplicates: {self.duplicates}, in train and eval: {self.overlap}",
            f"padding in batches of {self.batch_size}: {self.padding_waste:.0%}",
        ]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def check_rendered(
    rendered: Sequence[Rendered],
    tokenizer: Any,
    settings: RenderSettings,
    *,
    eval_rendered: Sequence[Rendered] | None = None,
    batch_size: int = 8,
    vocab_size: int | None = None,
) -> CheckReport:
    """Counts of the training examples, and the problems and notes of training and evaluation examples.

    Args:
        rendered: the training examples.
        tokenizer: the one that rendered them.
        settings: the ones that they were rendered by.
        eval_rendered: the evaluation examples, if any.
        batch_size: for the estimate of padding.
        vocab_size: rows of the model's embedding; the tokenizer's own size when None.
    """
    report = CheckReport(examples=len(rendered), batch_size=batch_size)
    _count(report, rendered)
    _find_problems(report, rendered, tokenizer, settings, vocab_size, "")
    if eval_rendered is not None:
        _find_problems(report, eval_rendered, tokenizer, settings, vocab_size, "eval: ")
        seen = {tuple(example.input_ids) for example in rendered}
        report.overlap = sum(tuple(example.input_ids) in seen for example in eval_rendered)
        if report.overlap:
            report.notes.append(f"{report.overlap} of {len(eval_rendered)} eval examples are in the training data too")
    if report.duplicates:
        report.notes.append(f"{report.duplicates} of {report.examples} examples repeat an earlier one")
    return report


def preview(rendered: Rendered, tokenizer: Any, *, color: bool = False) -> str:
    """The example as text, the supervised part in ``[[ ]]``, or in green with `color` (ANSI)."""
    opening, closing = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    parts: list[str] = []
    start = 0
    for end in range(1, len(rendered.labels) + 1):
        supervised = rendered.labels[start] != IGNORE
        if end < len(rendered.labels) and (rendered.labels[end] != IGNORE) == supervised:
            continue
        text = tokenizer.decode(
            rendered.input_ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        parts.append(f"{opening}{text}{closing}" if supervised else text)
        start = end
    return "".join(parts)


def _count(report: CheckReport, rendered: Sequence[Rendered]) -> None:
    if not rendered:
        return
    lengths = sorted(len(example.input_ids) for example in rendered)
    last = len(lengths) - 1
    report.tokens = sum(lengths)
    report.supervised_tokens = sum(example.supervised for example in rendered)
    report.length_min, report.length_max = lengths[0], lengths[-1]
    report.length_median, report.length_p95 = lengths[last // 2], lengths[round(last * 0.95)]
    report.truncated = sum(len(example.input_ids) < example.length_before_truncation for example in rendered)
    report.truncated_supervised = sum(example.cut_supervised > 0 for example in rendered)
    report.duplicates = len(rendered) - len({tuple(example.input_ids) for example in rendered})
    random.Random(0).shuffle(lengths)
    batches = [lengths[i : i + report.batch_size] for i in range(0, len(lengths), report.batch_size)]
    places = sum(max(batch) * len(batch) for batch in batches)
    report.padding_waste = 1 - report.tokens / places if places else 0.0


def _find_problems(
    report: CheckReport,
    rendered: Sequence[Rendered],
    tokenizer: Any,
    settings: RenderSettings,
    vocab_size: int | None,
    where: str,
) -> None:
    def find(bad: Callable[[Rendered], bool], text: str, into: list[str]) -> None:
        rows = [i for i, example in enumerate(rendered) if bad(example)]
        if rows:
            listed = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
            into.append(f"{where}{len(rows)} of {len(rendered)} examples {text} (rows {listed})")

    if not rendered:
        report.problems.append(f"{where}there are no examples")
        return
    vocab = vocab_size or len(tokenizer)
    bos, limit = tokenizer.bos_token_id, settings.max_length
    # every special token counts as a stop here: a template may close different turns differently
    stops = {*stop_token_ids(tokenizer, settings.chat_template), *tokenizer.all_special_ids}
    stops |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}

    find(
        lambda example: not example.supervised and not example.cut_supervised,
        "have no supervised token: nothing would be learned from them",
        report.problems,
    )
    find(
        lambda example: not example.supervised and example.cut_supervised > 0,
        f"lose every supervised token to max_length={limit}: raise it, or drop these rows",
        report.problems,
    )
    if settings.overlong != "truncate":
        find(
            lambda example: example.supervised > 0 and example.cut_supervised > 0,
            f"lose part of the supervised text, its stop token included, to max_length={limit}: "
            "raise it, shorten them, or set overlong='truncate'",
            report.problems,
        )
    find(
        lambda example: not example.cut_supervised and _last_supervised(example) not in {None, *stops},
        "do not supervise a stop token at the end of the answer: the model would never learn to stop",
        report.problems,
    )
    find(
        lambda example: bos is not None and example.input_ids[:2] == [bos, bos],
        "begin with two BOS tokens: remove it from the text or from the chat template",
        report.problems,
    )
    find(
        lambda example: min(example.input_ids, default=0) < 0 or max(example.input_ids, default=0) >= vocab,
        f"hold token ids outside the vocabulary of {vocab}: the tokenizer is not this model's, "
        "or the embedding was not resized for its new tokens",
        report.problems,
    )
    if not where:
        special = {"bos": bos, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        outside = [f"{name}={id_}" for name, id_ in special.items() if id_ is not None and not 0 <= id_ < vocab]
        if outside:
            report.problems.append(f"special tokens outside the vocabulary of {vocab}: {', '.join(outside)}")
        if bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]:
            find(
                lambda example: example.input_ids[:1] != [bos],
                "do not begin with the BOS token that the tokenizer adds to plain text: "
                "the chat template leaves it out",
                report.notes,
            )
    find(
        lambda example: example.supervised == 1,
        "supervise nothing but one token: an empty answer?",
        report.notes,
    )
    if settings.overlong == "truncate":
        find(lambda example: example.cut_supervised > 0, f"are cut to max_length={limit}", report.notes)


def _last_supervised(example: Rendered) -> int | None:
    return next((label for label in reversed(example.labels) if label != IGNORE), None)
