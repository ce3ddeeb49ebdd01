import json

import pytest

from deltaw.data.messages import SHAREGPT_ROLES, messages_of, sharegpt_turns, tools_of
from deltaw.errors import DataError

SCHEMA = {"name": "weather", "description": "It.", "parameters": {"type": "object", "properties": {}}}


def test_sharegpt_function_calls_are_tool_calls():
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    turns = [
        {"from": "human", "value": "How is it in Rome?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": '{"sky": "blue"}'},
        {"from": "gpt", "value": "Blue."},
    ]
    assert messages_of(sharegpt_turns(turns, "c"), "c") == [
        {"role": "user", "content": "How is it in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "assistant", "content": "Blue."},
    ]
    two = sharegpt_turns([{"from": "function_call", "value": json.dumps([call, call])}], "c")
    assert len(two[0]["tool_calls"]) == 2


def test_openai_arguments_as_json_become_what_templates_take():
    def arguments(value):
        message = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": value}}]}
        [checked] = messages_of([message], "m")
        assert message["tool_calls"][0]["function"]["arguments"] is value  # the row stays as it was
        return checked["tool_calls"][0]["function"]["arguments"]

    assert arguments('{"a": [1, null]}') == {"a": [1, None]}
    assert arguments({"a": 1}) == {"a": 1}
    assert arguments("not JSON") == "not JSON"
    assert arguments("[1]") == "[1]"
    assert arguments(None) == {}


def test_every_known_speaker_becomes_a_role():
    for name in SHAREGPT_ROLES:
        value = '{"name": "f"}' if "call" in name else "x"
        [turn] = messages_of(sharegpt_turns([{"from": name, "value": value}], "c"), "c")
        assert turn["role"] in ("system", "user", "assistant", "tool")


def test_tools():
    wrapped = [{"type": "function", "function": SCHEMA}]
    assert tools_of(json.dumps([SCHEMA])) == [SCHEMA]
    assert tools_of(json.dumps([SCHEMA]), wrapped=True) == wrapped == tools_of(wrapped, wrapped=True)
    assert tools_of(None) is tools_of("") is tools_of([]) is tools_of(" ") is None


@pytest.mark.parametrize(
    ("turn", "match"),
    [
        ({"from": "function_call", "value": "{"}, r"c\[0\] is a function call that is not valid JSON"),
        ({"from": "function_call", "value": "[]"}, "function call without a name"),
        ({"from": "function_call", "value": "3"}, "function call without a name"),
        ({"from": "function_call", "value": '{"arguments": {}}'}, "tool call without the name"),
        ({"from": "humen", "value": "x"}, "did you mean 'human'"),
        ({"from": None, "value": "x"}, "needs the keys"),
        ({"value": "x"}, "needs the keys"),
        ("x", "needs the keys"),
        ({"from": "gpt", "value": None}, "content of type NoneType"),
        ({"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}, "only the assistant"),
        ({"role": "assistant", "tool_calls": "f()"}, "not a list of mappings"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": 3}}]}, "without the name"),
    ],
)
def test_broken_turns(turn, match):
    with pytest.raises(DataError, match=match):
        messages_of(sharegpt_turns([turn], "c"), "c")


@pytest.mark.parametrize("tools", ["{", "[" * 100_000, 3, '{"name": "f"}'])
def test_broken_tools(tools):
    with pytest.raises(DataError, match=r"^tools "):
        tools_of(tools)
