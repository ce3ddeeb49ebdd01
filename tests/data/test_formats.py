import hypothesis
import hypothesis.strategies as st
import pytest

from deltaw.data import count_formats, detect_format, to_example, to_preference
from deltaw.data.formats import FORMATS, columns_read
from deltaw.errors import DataError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "### a b"}, "alpaca"),
        ({"text": "a"}, "text"),
        ({"text": "a", "prompt": None, "completion": None, "messages": None}, "text"),
        ({"messages": TURNS, "prompt": "a", "prompt_id": "x"}, "messages"),
        ({"messages": TURNS, "prompt": "a", "chosen": TURNS, "rejected": TURNS}, "messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"conversations": TURNS, "chosen": TURNS[1], "rejected": TURNS[1]}, "preference"),
        ({"text": "a", "label": 0}, "classification"),
        ({"text": "a", "label": None}, "text"),
        ({"instruction": "a", "output": "b", "text": "c", "label": "d"}, "alpaca"),
    ],
)
def test_formats_are_told_apart(row, kind):
    assert detect_format(row) == kind


def test_text_field_is_configurable():
    assert to_example({"body": "a"}, "body").text == "a"
    with pytest.raises(DataError, match=r"accepted are .* body"):
        detect_format({"text": "a"}, "body")


def test_unknown_row_names_keys_formats_and_the_nearest_name():
    with pytest.raises(DataError) as error:
        detect_format({"promt": "a", "completion": "b", "output": None})
    message = str(error.value)
    assert "'promt'" in message
    assert "did you mean 'prompt'?" in message
    assert "instruction + output" in message
    assert "['output'] are null" in message


def test_alpaca_is_a_user_turn_or_headed_sections():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "text": "trap"}
    chat = to_example(row)
    assert chat.prompt == [{"role": "user", "content": "Add.\n\n1 2"}]
    assert chat.completion == [{"role": "assistant", "content": "3"}]
    text = to_example(row, chat=False)
    assert text.prompt == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert text.completion == "3"
    assert "Input" not in str(to_example({**row, "input": ""}, chat=False).prompt)
    assert to_example({**row, "input": None}).prompt == [{"role": "user", "content": "Add."}]
    assert to_example({**row, "system": "Be brief."}).prompt[0] == {"role": "system", "content": "Be brief."}


def test_sharegpt_becomes_messages():
    row = {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert to_example(row).messages == [{"role": "system", "content": "s"}, *TURNS]


def test_tool_calls_need_no_content_and_tools_may_be_json():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    example = to_example({"messages": [TURNS[0], call], "tools": '[{"name": "f"}]'})
    assert example.messages[1]["content"] == ""
    assert example.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a", "completion": TURNS[1:]}, "both must be strings"),
        ({"prompt": TURNS[:1], "completion": TURNS[:1]}, "must start with 'assistant'"),
        ({"messages": []}, "empty list"),
        ({"messages": "hello"}, "list of messages, not str"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has content of type NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content of type list"),
        ({"conversations": [{"from": "martian", "value": "a"}]}, "from 'martian'"),
        ({"instruction": 3, "output": "a"}, "instruction must be a string, not int"),
        ({"instruction": "a", "output": "b", "history": [["x", "y"]]}, "'history'"),
        ({"text": 1}, "text must be a string"),
        ({"messages": TURNS, "tools": "["}, "tools is not valid JSON"),
        ("text", "must be a mapping"),
    ],
)
def test_bad_rows_are_refused_with_a_cure(row, match):
    with pytest.raises(DataError, match=match):
        to_example(row)


def test_a_row_without_its_answer_is_for_generation_only():
    with pytest.raises(DataError):
        to_example({"prompt": "a"})
    assert to_example({"prompt": "a"}, answered=False).completion is None
    assert to_example({"instruction": "a"}, answered=False).completion is None


GOOD = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "classification": {"text": "a", "label": "b"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", GOOD)
def test_a_named_format_is_taken_in_spite_of_other_columns(name):
    everything = {key: value for row in GOOD.values() for key, value in row.items()}
    alone = to_example(GOOD[name], label_names=["b"])
    assert to_example(everything, dataset_format=name, label_names=["b"]) == alone


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_format_says_what_a_row_lacks(name):
    with pytest.raises(DataError, match=f"dataset_format is '{name}', which needs .*: the row lacks "):
        to_example({"x": 1, **dict.fromkeys(FORMATS[name][0])}, dataset_format=name)


def test_a_named_format_finds_the_misspelt_column_and_the_misspelt_format():
    with pytest.raises(DataError, match="'output' is not there; did you mean 'outputs'"):
        to_example({"instruction": "a", "outputs": "b"}, dataset_format="alpaca")
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        to_example({"instruction": "a", "output": "b"}, dataset_format="alpacca")
    assert to_example({"prompt": "a"}, dataset_format="prompt_completion", answered=False).completion is None


def test_preference_pairs_are_refused_by_name_with_the_cure():
    for given in ("auto", "preference"):
        with pytest.raises(DataError, match=r"preference pair .*DPO.*write the chosen answer as 'completion'"):
            to_example({"prompt": "a", "chosen": "b", "rejected": "c"}, dataset_format=given)


def test_classification_is_a_short_answer_to_a_question_that_names_the_labels():
    row = {"text": "A fine film.", "label": 1}
    chat = to_example(row, label_names=["rotten", "fresh"])
    [turn] = chat.prompt
    assert turn["content"].startswith("A fine film.\n\n")
    assert turn["content"].endswith(": rotten, fresh.")
    assert chat.completion == [{"role": "assistant", "content": "fresh"}]
    assert to_example({"text": "A fine film.", "label": "fresh"}, label_names=["rotten", "fresh"]) == chat
    plain = to_example(row, label_names=["rotten", "fresh"], chat=False)
    assert plain.prompt.endswith("### Response:\n")
    assert plain.completion == "fresh"
    asked = to_example({"text": "A fine film."}, label_names=["rotten", "fresh"], answered=False,
                       dataset_format="classification")  # fmt: skip
    assert (asked.prompt, asked.completion) == (chat.prompt, None)
    body = to_example({"body": "x", "label": 0}, "body", label_names=["rotten", "fresh"])
    assert body.completion[0]["content"] == "rotten"


def test_formats_are_counted_and_columns_known():
    rows = [*GOOD.values(), GOOD["text"], {"nothing": 1}, {"chosen": "a", "rejected": "b"}]
    assert count_formats(rows) == {**dict.fromkeys(GOOD, 1), "text": 2, "preference": 1}
    assert columns_read("alpaca") >= {"instruction", "input", "output", "system"}
    assert columns_read("classification", "body") == {"body", "label"}


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "x"])
            | st.integers(),
            inner | st.sampled_from(["user", "assistant", "gpt", "function_call", "human", "system"]),
            max_size=4,
        )
    ),
    max_leaves=10,
)
COLUMNS = sorted({key.format(text="text") for needed, optional in FORMATS.values() for key in (*needed, *optional)})


@hypothesis.settings(max_examples=400)
@hypothesis.given(
    row=JUNK | st.dictionaries(st.sampled_from(COLUMNS) | st.integers(), JUNK, max_size=5),
    kind=st.sampled_from(["auto", "nonsense", *FORMATS]),
    chat=st.booleans(),
    answered=st.booleans(),
)
def test_no_row_does_more_than_be_refused(row, kind, chat, answered):
    for read in (
        lambda: to_example(row, chat=chat, answered=answered, dataset_format=kind, label_names=["a", "b"]),
        lambda: to_preference(row),
    ):
        try:
            read()
        except DataError:
            continue
