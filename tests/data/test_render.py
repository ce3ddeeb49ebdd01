import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data import IGNORE, RenderSettings, render, render_all, render_prompt, stop_token_ids
from deltaw.errors import ConfigError, DataError

USER = {"role": "user", "content": "How many cars in 2012?"}
ANSWER = {"role": "assistant", "content": "SELECT count(*) FROM cars WHERE year = 2012"}
TALK = [
    USER,
    ANSWER,
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "None.\n\nSorry"},
]
ROWS = [
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": [{"role": "system", "content": "SQL only."}, USER], "completion": [ANSWER]},
    {"messages": [USER, ANSWER]},
    {"messages": TALK},
    {"instruction": "Count.", "input": "cars", "output": ANSWER["content"], "text": "trap"},
    {"prompt": "Q: how many?\nA: ", "completion": " 12\n"},
    {"prompt": [USER], "completion": [{"role": "assistant", "content": "\nleading newline "}]},
]


def supervised(rendered, tokenizer):
    """The supervised runs, each decoded."""
    runs, previous = [], IGNORE
    for label in rendered.labels:
        if label != IGNORE:
            if previous == IGNORE:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


@pytest.fixture(params=["smol", "tiny", "plain"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def chat_rows(tokenizer):
    return [r for r in ROWS if tokenizer.chat_template or isinstance(r.get("prompt", r.get("output")), str)]


def test_labels_are_the_ids_or_ignored_and_every_answer_ends_with_eos(tokenizer):
    for row in chat_rows(tokenizer):
        rendered = render(row, tokenizer)
        assert len(rendered.labels) == len(rendered.input_ids) == rendered.length_before_truncation
        assert all(b in (IGNORE, a) for a, b in zip(rendered.input_ids, rendered.labels, strict=True))
        assert rendered.labels[-1] == rendered.input_ids[-1] == tokenizer.eos_token_id
        assert rendered.as_features() == {"input_ids": rendered.input_ids, "labels": rendered.labels}


def test_the_supervised_text_is_the_completion_and_its_stop(tokenizer):
    eos = tokenizer.eos_token
    for row in chat_rows(tokenizer):
        if "completion" in row:
            whole = row["completion"]
            answers = [whole if isinstance(whole, str) else whole[0]["content"]]
        elif "messages" in row:
            answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        else:
            answers = [row["output"]]
        assert supervised(render(row, tokenizer), tokenizer) == [answer + eos for answer in answers]


def test_training_sees_the_tokens_that_generation_sees(tokenizer):
    for row in chat_rows(tokenizer):
        prompt = render_prompt(row, tokenizer)
        rendered = render(row, tokenizer)
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.labels[len(prompt)] != IGNORE
        assert rendered.labels[len(prompt) - 1 : len(prompt)] in ([], [IGNORE])
        if isinstance(row.get("prompt"), list):
            template = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True)
            assert prompt == template["input_ids"]
        elif "prompt" in row:
            assert prompt == tokenizer(row["prompt"])["input_ids"]
        if "messages" not in row:
            bare = {k: v for k, v in row.items() if k not in ("completion", "output")}
            assert render_prompt(bare, tokenizer) == prompt


def test_each_turn_of_a_conversation_is_prompted_as_in_generation(tokenizer):
    if not tokenizer.chat_template:
        return
    rendered = render({"messages": TALK}, tokenizer)
    for end in (1, 3):
        prompt = render_prompt({"messages": TALK[:end]}, tokenizer)
        assert rendered.input_ids[: len(prompt)] == prompt


def test_the_default_system_prompt_is_there_once(smol):
    text = smol.decode(render({"messages": TALK}, smol).input_ids)
    assert text.count("<|im_start|>system") == 1
    assert "You are a helpful AI assistant named SmolLM" in text
    assert text.endswith("Sorry<|im_end|>")  # the template's newline behind the last turn is dropped


def test_newlines_between_turns_are_not_supervised(smol):
    rendered = render({"messages": TALK}, smol)
    after = [i + 1 for i, id_ in enumerate(rendered.input_ids[:-1]) if id_ == smol.eos_token_id]
    assert after
    assert all(rendered.labels[i] == IGNORE for i in after)


def test_exactly_one_bos(tiny):
    rows = [*ROWS, {"text": "abc"}, {"text": "<s>abc"}, {"prompt": "<s>Q", "completion": "A"}]
    for row in rows:
        ids = render(row, tiny).input_ids
        assert ids[0] == tiny.bos_token_id
        assert ids.count(tiny.bos_token_id) == 1
    assert render({"text": "abc"}, tiny).labels[0] == IGNORE


def test_eos_is_appended_once(tiny):
    for row in [{"text": "abc"}, {"text": "abc</s>"}, {"prompt": "a", "completion": "b</s>"}]:
        rendered = render(row, tiny)
        assert rendered.input_ids.count(tiny.eos_token_id) == 1
        assert rendered.labels[-1] == tiny.eos_token_id


def test_alpaca_with_a_text_column_never_supervises_the_prompt(smol, plain):
    row = {"instruction": "Count.", "input": "", "output": "12", "text": "Below is ... Count. 12"}
    assert supervised(render(row, smol), smol) == ["12<|im_end|>"]
    assert supervised(render(row, plain), plain) == ["12</s>"]
    text = plain.decode(render(row, plain).input_ids)
    assert text == "<s>### Instruction:\nCount.\n\n### Response:\n12</s>"


def test_a_template_without_a_stop_gets_eos_at_the_end(tiny):
    tiny.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rendered = render({"messages": [USER, ANSWER]}, tiny)
    assert rendered.labels[-1] == tiny.eos_token_id
    assert stop_token_ids(tiny) == [tiny.eos_token_id]


def test_another_end_of_turn_than_eos_is_supervised_and_a_stop(tiny):
    tiny.add_special_tokens({"additional_special_tokens": ["<eot>"]})
    template = str(tiny.chat_template).replace("eos_token", "'<eot>'")
    rendered = render({"messages": [USER, ANSWER]}, tiny, RenderSettings(chat_template=template))
    eot = tiny.convert_tokens_to_ids("<eot>")
    assert rendered.labels[-1] == eot
    assert stop_token_ids(tiny, template) == [tiny.eos_token_id, eot]


def test_loss_settings(smol):
    talk = {"messages": TALK}
    everything = render(talk, smol, RenderSettings(completion_only_loss=False))
    assert everything.labels == [IGNORE, *everything.input_ids[1:]]
    assert everything.input_ids == render(talk, smol).input_ids
    split = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert len(supervised(render(split, smol), smol)) == 1
    both = RenderSettings(completion_only_loss=False, assistant_only_loss=True)
    assert render(split, smol, both).labels == render(talk, smol).labels
    plain = render({"prompt": "a", "completion": "b"}, smol, RenderSettings(completion_only_loss=False))
    assert plain.labels == [IGNORE, *plain.input_ids[1:]]


def test_the_first_token_is_never_counted_as_supervised(smol, tiny):
    """No position predicts it, so counting it would hide an example from which nothing is learned."""
    assert render({"text": "a b"}, smol).supervised == 2
    assert render({"text": "a"}, tiny).supervised == 2  # BOS predicts it
    assert render({"text": ""}, smol).supervised == 0
    assert render({"prompt": "", "completion": ""}, smol).supervised == 0


@pytest.mark.parametrize(
    ("row", "settings", "match"),
    [
        ({"text": "a"}, RenderSettings(completion_only_loss=True), "plain text"),
        ({"text": "a"}, RenderSettings(assistant_only_loss=True), "conversation"),
        ({"prompt": "a", "completion": "b"}, RenderSettings(assistant_only_loss=True), "conversation"),
    ],
)
def test_settings_that_do_not_fit_the_row(smol, row, settings, match):
    with pytest.raises(DataError, match=match):
        render(row, smol, settings)


def test_truncation_says_what_was_lost(smol):
    row = ROWS[0]
    whole = render(row, smol)
    cut = render(row, smol, RenderSettings(max_length=len(whole.input_ids) - 3))
    assert cut.input_ids == whole.input_ids[:-3]
    assert cut.length_before_truncation == len(whole.input_ids)
    assert cut.cut_supervised == 3
    exact = RenderSettings(max_length=len(whole.input_ids))
    assert render(row, smol, exact) == whole == render(row, smol, RenderSettings(max_length=None))
    with pytest.raises(ConfigError, match="at least 2"):
        RenderSettings(max_length=0)


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny):
    tiny.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if loop.last %}<think></think>{% endif %}"
        "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(DataError, match=r"not prefix-stable.*last_turn_only_loss: true"):
        render({"messages": TALK}, tiny)


def test_messages_without_a_template_and_templates_that_raise(plain):
    with pytest.raises(DataError, match="chat template and the tokenizer has none"):
        render({"messages": TALK}, plain)
    settings = RenderSettings(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        render({"messages": TALK}, plain, settings)


def test_tools_that_the_template_drops_are_an_error(smol):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]}
    with pytest.raises(DataError, match="leaves out the tools \\['weather'\\]"):
        render({"messages": [USER, call]}, smol)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"messages": [ANSWER]}, "starts with the assistant"),
        ({"text": "half \ud800"}, "character 5 .* lone surrogate"),
        ({"messages": [USER, {"role": "assistant", "content": "\udc00"}]}, "lone surrogate"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": 3}]}, "tool_calls"),
        ({"conversations": [{"from": [], "value": "a"}]}, "known are"),
    ],
)
def test_strange_rows_are_clear_errors(smol, row, match):
    with pytest.raises(DataError, match=match):
        render(row, smol)


def test_no_eos_at_all(plain):
    plain.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        render({"text": "a"}, plain)


def test_render_all_collects_every_bad_row(smol):
    steps = []
    good = [ROWS[0]] * 3
    rendered = render_all(good, smol, progress=lambda done, all_: steps.append((done, all_)))
    assert rendered == [render(ROWS[0], smol)] * 3
    assert steps[-1] == (3, 3)
    with pytest.raises(DataError) as error:
        render_all([*good, *[{"bad": 1}] * 7], smol)
    message = str(error.value)
    assert message.startswith("7 of 10 rows")
    assert "row 3: its format is unknown" in message
    assert "row 7:" in message
    assert "row 8:" not in message
    assert "... and 2 more" in message


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]), inner)
    ),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=8)}
)
KEYS = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "text",
    "tools",
]


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(TURN, max_size=4) | st.text(max_size=8)))
def test_any_row_gives_a_sound_example_or_one_clear_error(smol, row):
    try:
        rendered = render(row, smol)
    except DataError:
        return
    assert len(rendered.input_ids) == len(rendered.labels) == rendered.length_before_truncation
    assert all(b in (IGNORE, a) for a, b in zip(rendered.input_ids, rendered.labels, strict=True))
    if rendered.supervised:
        assert [label for label in rendered.labels if label != IGNORE][-1] == smol.eos_token_id
