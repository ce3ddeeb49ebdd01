"""The page of a data check: counts, lengths, findings, and examples with what is learned of them marked.

Given a report and pieces of text, draws them. Knows nothing of tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deltaw.data.check_report import CheckReport, Finding
from deltaw.report.charts import histogram
from deltaw.report.page import Page, Tone

__all__ = ["check_page"]

_TONES: dict[str, Tone] = {"error": "bad", "warning": "warn", "note": ""}


def check_page(
    report: CheckReport, examples: Sequence[Mapping[str, Any]], name: str, bad: Iterable[Finding] = ()
) -> Page:
    """The page.

    Args:
        report: of `deltaw.data.check_tokens`.
        examples: each with ``row``, ``tokens``, ``learned`` and ``pieces`` (see `deltaw.data.check_preview`).
        name: of the run or its data.
        bad: the findings that stop the run.
    """
    stops = list(bad)
    page = Page(f"Data check of {name}", "What is learned, what is wrong, and what to do about it")
    if stops:
        names = ", ".join(dict.fromkeys(finding.name for finding in stops))
        page.add_text(f"{len(stops)} finding(s) stop this run: {names}.", "bad")
    else:
        page.add_text("Nothing stops this run.", "good")
    share = report.supervised_tokens / report.tokens if report.tokens else 0.0
    facts = {"examples": f"{report.examples:,}", "tokens": f"{report.tokens:,}", "of them learned": f"{share:.0%}"}
    if report.eval_examples:
        facts["to evaluate on"] = f"{report.eval_examples:,}"
    if report.steps:
        facts["optimizer steps"] = f"{report.steps:,}"
    page.add_facts(facts)

    page.add_heading("Findings")
    for finding in report.findings:
        page.add_finding(
            f"{finding.level} · {finding.name}" + ("" if finding.where == "train" else f" · {finding.where}"),
            finding.message + (f" ({finding.shown_rows})" if finding.shown_rows else ""),
            f"Cure: {finding.cure}" if finding.cure else "",
            _TONES[finding.level],
        )
    if not report.findings:
        page.add_text("None.", "soft")

    if examples:
        page.add_heading("Examples")
        page.add_text(
            "As the model reads them: what the loss covers is marked, and control tokens are set apart.", "soft"
        )
    for example in examples:
        said = f"{example['row']}: {example['tokens']:,} tokens, {example['learned']:,} of them learned"
        page.add_marked(example["pieces"], caption=said)

    page.add_heading("Lengths")
    if report.histogram:
        chart = histogram(report.histogram, x_label="tokens", y_label="examples", title="Examples by length")
        page.add_svg(chart, "Tokens of an example, after anything was cut")
    page.add_pairs(
        {
            "length": f"{report.length_min} to {report.length_max} tokens",
            "median, 95%": f"{report.length_median}, {report.length_p95}",
            "cut": f"{report.truncated:,}; {report.truncated_supervised:,} of them lose learned text",
            "rows left out": f"{report.dropped:,}",
            "repeated": f"{report.duplicates:,}",
            "in train and eval": f"{report.overlap:,}",
        }
    )
    if report.waste:
        rows = [(name.replace("_", " "), f"{part:.1%}") for name, part in report.waste.items()]
        page.add_table(
            ["batches", "places that hold nothing"],
            rows,
            numbers=(1,),
            caption=f"Batches of {report.batch_size}, one epoch",
        )
    return page
