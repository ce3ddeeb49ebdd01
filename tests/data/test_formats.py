import pytest

from deltaw.data import detect_format, to_example
from deltaw.errors import DataError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "input": "", "output": "b", "text": "### a b"}, "alpaca"),
        ({"text": "a"}, "text"),
        ({"text": "a", "prompt": None, "completion": None, "messages": None}, "text"),
        ({"messages": TURNS, "prompt": "a", "prompt_id": "x"}, "messages"),
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
