import pytest

from deltaw.data import RenderSettings, render, render_prompt, with_labels
from deltaw.data.labels import MOST_LABELS, label_of, labels_in, question
from deltaw.errors import DataError

NAMES = ["rotten", "fresh"]


@pytest.mark.parametrize("value", ["fresh", 1, "1", " 1 ", True])
def test_a_label_is_a_name_or_a_number(value):
    assert label_of({"label": value}, NAMES) == "fresh"


def test_a_name_that_is_a_number_is_that_name():
    assert label_of({"label": "1"}, ["1", "2"]) == "1"


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("frsh", "did you mean 'fresh'"),
        (2, "label is 2, and the label names are"),
        (-1, "label is -1"),
        (0.5, "must be a name or a whole number, not float 0.5"),
        ([0], "not list"),
    ],
)
def test_what_is_no_label(value, match):
    with pytest.raises(DataError, match=match):
        label_of({"label": value}, NAMES)


def test_names_are_found_in_the_rows_or_asked_for():
    rows = [{"text": "x", "label": label} for label in "bab"]
    assert labels_in(rows) == ["a", "b"]
    assert with_labels(RenderSettings(), rows).label_names == ("a", "b")
    others = [{"instruction": "x", "output": "y", "text": "z", "label": "c"}, {"text": "x"}, {"label": "d"}]
    assert with_labels(RenderSettings(), [*rows, *others]).label_names == ("a", "b")
    for untouched in (RenderSettings(), RenderSettings(dataset_format="text")):
        assert with_labels(untouched, others if untouched == RenderSettings() else rows) is untouched
    given = RenderSettings(label_names=("a", "b", "c"))
    assert with_labels(given, rows) is given
    for bad, match in [
        ([{"label": 0}], "labels are numbers .*dataset_label_names"),
        ([{"label": "7"}], "labels are numbers"),
        ([{"label": " "}], "empty string"),
        ([{"label": f"name {i}"} for i in range(MOST_LABELS + 1)], "no class"),
    ]:
        with pytest.raises(DataError, match=match):
            labels_in(bad)
    with pytest.raises(DataError, match="names of all labels"):
        question("a", None)


def test_rendered_through_the_chat_template(smol):
    settings = RenderSettings(label_names=("rotten", "fresh"))
    row = {"text": "A fine film.", "label": 1}
    done = render(row, smol, settings)
    answer = [label for label in done.labels if label >= 0]
    assert smol.decode(answer) == "fresh<|im_end|>"
    assert done.input_ids[: len(done.input_ids) - len(answer)] == render_prompt(row, smol, settings)
    assert "rotten, fresh" in smol.decode(done.input_ids)
