"""The demo's report: results in, one self-contained HTML page out. Knows nothing of models or the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltaw.evaluate import Score
from deltaw.report import Bars, Page, grouped_bars, loss_curve
from text_to_sql.demo_beside import Beside
from text_to_sql.demo_show import SPLIT_NAMES, Example, clock, megabytes
from text_to_sql.demo_steps import Merged
from text_to_sql.demo_training import Learned

__all__ = ["report"]

Scores = Mapping[str, Score]


def report(
    facts: Mapping[str, Any],
    *,
    baseline: Scores,
    before: Scores,
    after: Scores,
    learned: Learned,
    merged: Merged,
    examples: Sequence[Example],
    beside: Beside | None = None,
) -> Page:
    """The whole page.

    Args:
        facts: what ``results.json`` holds: ``model``, ``recipe``, ``sizes``, ``seconds``, ``versions``, ...
        baseline, before, after: by split.
        beside: the same run in 16 bits, for one in 4.
    """
    page = Page(
        "A language model learns SQL",
        f"{facts['model']}, {facts['method']} of rank {facts['recipe']['r']}, {len(learned.log)} steps in "
        f"{clock(learned.seconds)} on {facts['machine']['device']}",
    )
    page.add_text(
        "A question in English and one table's columns go in, one SQLite query comes out. An answer is right when "
        "its query returns the same rows as the reference query on the real table. No reference query of a test "
        "question occurs in training."
    )
    page.add_facts(_headline(facts, before, after, learned))
    _accuracy(page, baseline, before, after)
    _training(page, learned)
    if beside is not None:
        _beside(page, beside)
    page.add_heading("What it answers")
    for one in examples:
        _example(page, one)
    _merging(page, merged)
    page.add_heading("How it was done")
    page.add_pairs({key.replace("_", " "): value for key, value in facts["recipe"].items()})
    page.add_pairs(
        {
            "trainable parameters": facts["trainable"],
            "training rows": f"{facts['train_rows']:,}, drawn with seed {facts['seed']}",
            "read back from disk": facts["read_back"],
            "adapter": facts["adapter"],
        }
    )
    page.add_heading("Time")
    page.add_pairs({stage: f"{seconds:.1f} s" for stage, seconds in facts["seconds"].items()})
    page.add_heading("Versions and machine")
    page.add_pairs({**facts["versions"], **facts["machine"]})
    return page


def _headline(facts: Mapping[str, Any], before: Scores, after: Scores, learned: Learned) -> dict[str, str]:
    tiles = {
        SPLIT_NAMES[split]: f"{before[split].value:.0%} → {after[split].value:.0%}" for split in ("wording", "both")
    }
    sizes = facts["sizes"]
    return tiles | {
        "training": clock(learned.seconds),
        "adapter, beside " + megabytes(sizes["base"]): megabytes(sizes["adapter"]),
    }


def _accuracy(page: Page, baseline: Scores, before: Scores, after: Scores) -> None:
    page.add_heading("Before and after")
    labels = [name.replace(", ", ",\n") for split, name in SPLIT_NAMES.items() if split in after]
    chart = grouped_bars(
        labels,
        [
            Bars("before", [s.value for s in before.values()], [s.interval for s in before.values()]),
            Bars("after", [s.value for s in after.values()], [s.interval for s in after.values()]),
        ],
        marks=Bars("no training: nearest question", [s.value for s in baseline.values()]),
        y_label="execution accuracy",
        title="Execution accuracy before and after training, by split, with 95% intervals",
    )
    page.add_svg(chart)
    page.add_table(
        ["questions about", "no training", "before", "after", "right"],
        [
            [
                SPLIT_NAMES[split],
                f"{baseline[split].value:.0%}",
                _share(before[split]),
                _share(after[split]),
                f"{after[split].right} of {after[split].total}",
            ]
            for split in after
        ],
        numbers=(1, 2, 3, 4),
        caption=f"In brackets 95% intervals (Wilson). Before: the first {_asked(before)} of the same questions a "
        "split. No training: the nearest training question's SQL with the names swapped in; it may look values "
        "up in the table, which the model may not.",
    )


def _training(page: Page, learned: Learned) -> None:
    page.add_heading("Training")
    steps = [entry["step"] for entry in learned.log]
    losses = [entry["loss"] for entry in learned.log]
    rates = [entry["learning_rate"] for entry in learned.log]
    page.add_svg(
        loss_curve(steps, losses, learning_rate=rates),
        f"Loss per answer token. {learned.tokens:,} tokens read, {learned.tokens / learned.seconds:,.0f} a second.",
    )
    if learned.stopped is not None:
        page.add_text(f"Training was stopped by the clock after step {learned.stopped}.", "bad")


def _beside(page: Page, beside: Beside) -> None:
    page.add_heading("Beside 16 bits")
    if beside.other is None:
        page.add_text(f"{beside.why[0].upper()}{beside.why[1:]}.", "soft")
        return
    page.add_table(["", "16 bits", "4 bits"], [list(row) for row in beside.rows()], numbers=(1, 2))


def _example(page: Page, one: Example) -> None:
    code = f"{one.sql}\n-- result: {one.returned}"
    if not one.right:
        code += f"\n-- gold: {one.gold}"
    mark = "✓" if one.right else "✗"
    page.add_code(
        code,
        caption=f"{mark} {one.question} ({SPLIT_NAMES[one.split]})",
        tone="good" if one.right else "bad",
    )


def _merging(page: Page, merged: Merged) -> None:
    page.add_heading("Merged into the base")
    page.add_text(
        f"Folded into the base's weights, the adapter answers {merged.together.value:.1%} of "
        f"“{SPLIT_NAMES[merged.split]}” right; beside the base it was {merged.apart.value:.1%} ({merged.verdict}).",
        "" if merged.holds else "bad",
    )
    drift = str(merged.drift)
    page.add_text(f"{drift[0].upper()}{drift[1:]}.", "soft")
    if merged.other_way:
        page.add_text(f"{merged.other_way[0].upper()}{merged.other_way[1:]}.", "soft")
    if merged.differing:
        page.add_table(
            ["question", "apart", "merged"],
            [[q, f"{a} ({x})", f"{b} ({y})"] for q, a, b, x, y in merged.differing],
            caption="Every question that is answered in other words than before merging.",
        )
    else:
        page.add_text("Every answer is the same, letter for letter.")


def _share(score: Score) -> str:
    low, high = score.interval
    return f"{score.value:.0%} ({100 * low:.0f}–{100 * high:.0f})"


def _asked(scores: Scores) -> int:
    return max(score.total for score in scores.values())
