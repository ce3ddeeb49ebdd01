"""The check as a whole: counts, findings by name, what stops a run and what is allowed to pass."""

import json

import pytest

from deltaw.data import (
    IGNORE,
    CheckReport,
    Finding,
    Rendered,
    RenderSettings,
    TokenDataset,
    Training,
    check_features,
    check_rendered,
    check_tokens,
    render,
    render_all,
)
from deltaw.errors import ConfigError, DataError

SETTINGS = RenderSettings()


def row(answer, question="hi"):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def names(report, level=None):
    return {finding.name for finding in report.findings if level in (None, finding.level)}


def test_good_data_has_counts_and_no_problems(smol):
    rendered = render_all([row("a"), row("b b"), row("c c c"), row("a")], smol)
    report = check_rendered(rendered, smol, SETTINGS, eval_rendered=render_all([row("d")], smol), batch_size=4)
    assert report.problems == []
    report.raise_if_bad()
    assert report.examples == 4
    assert report.eval_examples == 1
    assert report.tokens == sum(len(r.input_ids) for r in rendered)
    assert report.supervised_tokens == 2 + 3 + 4 + 2
    assert (report.length_min, report.length_max) == (len(rendered[0].input_ids), len(rendered[2].input_ids))
    assert (report.duplicates, report.overlap) == (1, 0)
    assert report.padding_waste == pytest.approx(1 - report.tokens / (4 * report.length_max))
    assert sum(count for _, _, count in report.histogram) == 4
    assert "4 examples" in str(report)


def test_findings_have_the_worst_first_and_are_plain_data(smol):
    rendered = render_all([row("a"), row("b"), row("a")], smol)
    report = check_rendered(rendered, smol, SETTINGS, eval_rendered=rendered[:1])
    levels = [finding.level for finding in report.findings]
    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    overlap = report.find("train-eval-overlap")
    assert overlap is not None
    assert (overlap.where, overlap.level, overlap.rows, overlap.count) == ("eval", "error", (0,), 1)
    assert report.overlap == 1
    again = json.loads(json.dumps(report.to_dict()))
    assert again["findings"][0]["name"] == "train-eval-overlap"
    assert again["examples"] == 3


def test_a_finding_that_is_meant_is_allowed_by_name(smol):
    rendered = render_all([row("a"), row("b")], smol)
    report = check_rendered(rendered, smol, SETTINGS, eval_rendered=rendered[:1])
    with pytest.raises(DataError, match=r"--allow train-eval-overlap\n.*\[train-eval-overlap\]"):
        report.raise_if_bad(allow=["truncated-answer"])
    report.raise_if_bad(allow=["train-eval-overlap"])
    with pytest.raises(ConfigError, match=r"'train-eval-overlaps' is no finding.*did you mean 'train-eval-overlap'"):
        report.raise_if_bad(allow=["train-eval-overlaps"])


def test_little_overlap_and_few_repetitions_are_milder(smol):
    train = render_all([row(f"answer {i}", f"question {i}") for i in range(60)], smol)
    held = render_all([row(f"answer {i}", f"question {i}") for i in range(59, 100)], smol)
    report = check_rendered([*train, train[0]], smol, SETTINGS, eval_rendered=held)
    assert {"train-eval-overlap"} <= names(report, "warning")
    assert {"duplicates"} <= names(report, "note")
    assert report.problems == []


def test_truncation_of_supervised_text_is_a_problem_unless_asked_for(smol):
    length = len(render(row("one two three four"), smol).input_ids) - 2
    strict = RenderSettings(max_length=length)
    rendered = render_all([row("one two three four"), row("one")], smol, strict)
    report = check_rendered(rendered, smol, strict)
    assert (report.truncated, report.truncated_supervised) == (1, 1)
    with pytest.raises(DataError, match=r"max_length=\d+.*\(rows 0\); cure: raise max_length"):
        report.raise_if_bad()
    allowed = RenderSettings(max_length=length, overlong="truncate")
    report = check_rendered(rendered, smol, allowed)
    assert report.problems == []
    assert "truncated-answer" in names(report, "warning")


def test_what_is_cut_or_left_out_is_counted(smol):
    ids = [*range(30, 40), smol.eos_token_id]
    labels = [IGNORE] * 9 + ids[9:]
    cut = TokenDataset.of([Rendered(ids, labels, 50)], dropped=3)
    for overlong, level in (("error", "error"), ("truncate_prompt", "warning")):
        settings = RenderSettings(max_length=11, overlong=overlong)
        report = check_tokens(cut, smol, settings)
        assert ("too-long" if overlong == "error" else "truncated-prompt") in names(report, level)
    assert report.dropped == 3
    dropped = report.find("dropped-rows")
    assert dropped is not None
    assert "3 of 4 rows" in dropped.message


def test_an_example_without_supervised_tokens_is_always_a_problem(smol):
    settings = RenderSettings(max_length=10, overlong="truncate")
    report = check_rendered(render_all([row("a")], smol, settings), smol, settings)
    assert "answer-cut-away" in names(report, "error")
    question = render({"messages": [{"role": "user", "content": "a"}]}, smol)
    assert "no-supervised-token" in names(check_rendered([question], smol, SETTINGS), "error")


def test_all_problems_come_at_once(tiny):
    bos, eos = tiny.bos_token_id, tiny.eos_token_id
    examples = [
        Rendered([bos, bos, 5, eos], [IGNORE, IGNORE, 5, eos], 4),  # two BOS
        Rendered([bos, 5, 6, eos], [IGNORE, IGNORE, 6, IGNORE], 4),  # the pad = eos mask
        Rendered([bos, 5, 99999, eos], [IGNORE, IGNORE, 99999, eos], 4),  # not of this vocabulary
        Rendered([5, 7, 6, eos], [IGNORE, IGNORE, 6, eos], 4),  # no BOS, where others have one
    ]
    with pytest.raises(DataError) as error:
        check_rendered(examples, tiny, SETTINGS, eval_rendered=[]).raise_if_bad()
    message = str(error.value)
    for part in ("5 problem", "two BOS", "(rows 1)", "outside the vocabulary", "and others do", "eval: there are no"):
        assert part in message


def test_every_turn_must_end_not_only_the_last(smol):
    eos = smol.eos_token_id
    ids = [30, 31, 32, 33, 34, eos]
    inner = Rendered(ids, [IGNORE, 31, 32, IGNORE, 34, eos], 6)
    assert "stop-token-not-supervised" in names(check_rendered([inner], smol, SETTINGS), "error")
    other = smol.convert_tokens_to_ids("<|im_start|>")  # special, but generation goes on after it
    odd = Rendered([30, 31, other], [IGNORE, 31, other], 3)
    assert "other-stop-token" in names(check_rendered([odd], smol, SETTINGS), "warning")


def test_blocks_of_a_document_end_with_the_last_one(smol):
    blocks = [Rendered([30, 31], [30, 31], 2), Rendered([32, smol.eos_token_id], [32, smol.eos_token_id], 2)]
    assert check_tokens(TokenDataset.of(blocks, rows=[0, 0]), smol, SETTINGS).problems == []
    assert check_tokens(TokenDataset.of(blocks, rows=[0, 1]), smol, SETTINGS).problems != []


def test_a_small_embedding_and_empty_data(smol):
    rendered = [render(row("a"), smol)]
    assert "vocabulary of 10 " in " ".join(check_rendered(rendered, smol, SETTINGS, vocab_size=10).problems)
    assert names(check_rendered([], smol, SETTINGS), "error") == {"no-examples"}


def test_tokens_made_elsewhere_are_checked_too(smol):
    good = render(row("yes"), smol)
    masked = [IGNORE if label == smol.pad_token_id else label for label in good.labels]
    report = check_features([{"input_ids": good.input_ids, "labels": masked}], smol, SETTINGS)
    assert "stop-token-not-supervised" in names(report, "error")
    assert check_features([good.as_features()], smol, SETTINGS).problems == []
    with pytest.raises(DataError, match="row 0 has 2 input_ids and 1 labels"):
        check_features([{"input_ids": [1, 2], "labels": [1]}], smol, SETTINGS)


def test_findings_name_the_lines_of_their_rows(smol, tmp_path):
    from deltaw.data import load_rows

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": ["", "a"][i % 2]}) + "\n" for i in range(4)))
    rows = load_rows(str(path))
    report = check_tokens(TokenDataset.of(render_all(rows, smol)), smol, SETTINGS, rows=rows)
    empty = report.find("empty-answer")
    assert empty is not None
    assert empty.places == (f"{path}:1", f"{path}:3")
    assert empty.shown_rows == f"{path}:1, 3"
    assert f"({path}:1, 3)" in str(empty)


def test_a_long_list_of_rows_is_shortened():
    finding = Finding.of("duplicates", "many", rows=range(20), count=100)
    assert finding.shown_rows == "rows 0, 1, 2, 3, 4, ..."
    assert Finding.of("few-rows", "few").shown_rows == ""


def test_the_run_is_part_of_what_is_checked(smol):
    rendered = TokenDataset.of(render_all([row(f"a {i}", f"q {i}") for i in range(30)], smol))
    report = check_tokens(rendered, smol, SETTINGS, training=Training(8, 4, 5.0))
    assert report.steps == 5
    assert {"few-rows", "few-steps", "many-epochs"} <= names(report, "warning")
    calm = check_tokens(rendered, smol, SETTINGS, training=Training(1, 1, 1.0, max_steps=40))
    assert calm.steps == 40
    assert names(calm, "warning") == set()


def test_an_empty_report_says_so():
    assert "0 examples" in str(CheckReport())
