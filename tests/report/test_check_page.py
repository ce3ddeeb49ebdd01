"""The page of a check: all findings, the masks, no markup of the rows' own."""

from deltaw.data import CheckReport, Finding
from deltaw.report import check_page

PIECES = [("<b>ask</b>", False, False), ("yes", True, False), ("<end>", True, True)]


def test_everything_that_was_found_is_on_the_page():
    report = CheckReport(examples=3, tokens=100, supervised_tokens=25, eval_examples=2, steps=7)
    report.histogram = [(1, 10, 2), (11, 20, 1)]
    report.waste = {"random": 0.25, "group_by_length": 0.125}
    bad = Finding.of("no-supervised-token", "2 of 3 examples <i>", rows=[0, 2], count=2)
    report.add([Finding.of("duplicates", "1 of 3 examples", where="eval"), bad])
    example = {"row": "a.jsonl:3", "tokens": 9, "learned": 2, "pieces": PIECES}
    text = check_page(report, [example], "run & rows", [bad]).html()
    for part in (
        "Data check of run &amp; rows",
        "1 finding(s) stop this run: no-supervised-token.",
        "error · no-supervised-token",
        "warning · duplicates · eval",
        "2 of 3 examples &lt;i&gt;",
        "(rows 0, 2)",
        "a.jsonl:3: 9 tokens, 2 of them learned",
        "&lt;b&gt;ask&lt;/b&gt;<mark>yes</mark><mark><b>&lt;end&gt;</b></mark>",
        "25.0%",
        "group by length",
        "<svg",
    ):
        assert part in text, part


def test_a_page_of_nothing():
    text = check_page(CheckReport(), [], "nothing").html()
    assert "Nothing stops this run." in text
    assert "<svg" not in text
