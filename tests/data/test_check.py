import pytest

from deltaw.data import IGNORE, Rendered, RenderSettings, check_rendered, preview, render, render_all
from deltaw.errors import DataError

SETTINGS = RenderSettings()


def row(answer, question="hi"):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def test_good_data_has_counts_and_no_problems(smol):
    rendered = render_all([row("a"), row("b b"), row("c c c"), row("a")], smol)
    report = check_rendered(rendered, smol, SETTINGS, eval_rendered=rendered[:1], batch_size=4)
    assert report.problems == []
    report.raise_if_bad()
    assert report.examples == 4
    assert report.tokens == sum(len(r.input_ids) for r in rendered)
    assert report.supervised_tokens == 2 + 3 + 4 + 2
    assert (report.length_min, report.length_max) == (len(rendered[0].input_ids), len(rendered[2].input_ids))
    assert (report.duplicates, report.overlap) == (1, 1)
    assert report.padding_waste == pytest.approx(1 - report.tokens / (4 * report.length_max))
    assert len(report.notes) == 2
    assert "4 examples" in str(report)


def test_truncation_of_supervised_text_is_a_problem_unless_allowed(smol):
    length = len(render(row("one two three four"), smol).input_ids) - 2
    strict = RenderSettings(max_length=length)
    rendered = render_all([row("one two three four"), row("one")], smol, strict)
    report = check_rendered(rendered, smol, strict)
    assert (report.truncated, report.truncated_supervised) == (1, 1)
    with pytest.raises(DataError, match=r"max_length=\d+.*overlong='truncate' \(rows 0\)"):
        report.raise_if_bad()
    allowed = RenderSettings(max_length=length, overlong="truncate")
    report = check_rendered(rendered, smol, allowed)
    assert report.problems == []
    assert "are cut to max_length" in report.notes[0]


def test_an_example_without_supervised_tokens_is_always_a_problem(smol):
    settings = RenderSettings(max_length=10, overlong="truncate")
    report = check_rendered(render_all([row("a")], smol, settings), smol, settings)
    assert "lose every supervised token to max_length=10" in report.problems[0]
    question = render({"messages": [{"role": "user", "content": "a"}]}, smol)
    assert "no supervised token" in check_rendered([question], smol, SETTINGS).problems[0]


def test_all_problems_come_at_once(tiny):
    bos, eos = tiny.bos_token_id, tiny.eos_token_id
    examples = [
        Rendered([bos, bos, 5, eos], [IGNORE, IGNORE, 5, eos], 4),  # two BOS
        Rendered([bos, 5, 6, eos], [IGNORE, IGNORE, 6, IGNORE], 4),  # the pad = eos mask
        Rendered([bos, 5, 99999, eos], [IGNORE, IGNORE, 99999, eos], 4),  # not of this vocabulary
    ]
    with pytest.raises(DataError) as error:
        check_rendered(examples, tiny, SETTINGS, eval_rendered=[]).raise_if_bad()
    message = str(error.value)
    for part in (
        "4 problem",
        "two BOS",
        "never learn to stop (rows 1)",
        "outside the vocabulary",
        "eval: there are no",
    ):
        assert part in message


def test_a_small_embedding_and_empty_data(smol):
    rendered = [render(row("a"), smol)]
    assert "vocabulary of 100" in check_rendered(rendered, smol, SETTINGS, vocab_size=100).problems[0]
    assert check_rendered([], smol, SETTINGS).problems == ["there are no examples"]


def test_a_template_without_bos_is_noted(tiny):
    settings = RenderSettings(chat_template=str(tiny.chat_template).replace("{{ bos_token }}", ""))
    report = check_rendered([render(row("a"), tiny, settings)], tiny, settings)
    assert report.problems == []
    assert "do not begin with the BOS" in report.notes[0]


def test_preview_marks_the_supervised_part(smol):
    text = preview(render(row("yes"), smol), smol)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[[yes<|im_end|>]]")
    assert preview(render(row("yes"), smol), smol, color=True).endswith("\x1b[32myes<|im_end|>\x1b[0m")
