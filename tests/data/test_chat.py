"""Masks from ``{% generation %}`` marks, and from prefixes: the same where both work."""

from __future__ import annotations

import pytest
from chattokenizers import byte_level, llama_like

from deltaw.data import IGNORE, RenderSettings, render, render_prompt
from deltaw.errors import DataError

TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "one\n"},
    {"role": "assistant", "content": "\nthe first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "the second \n"},
]
#: {B} and {E} stand where marks begin and end
SHAPES = {
    "chatml": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<s>assistant\n{B}{{ m.content }}</s>{E}{{ '\\n' }}"
        "{% else %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    ),
    "inst": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{B} {{ m.content }}</s>{E}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
}
MAKERS = {"chatml": byte_level, "inst": llama_like}


def templates(name, begin="{% generation %}", end="{% endgeneration %}"):
    shape = SHAPES[name]
    return shape.replace("{B}", "").replace("{E}", ""), shape.replace("{B}", begin).replace("{E}", end)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"last_turn_only_loss": True}, {"assistant_only_loss": True}, {"completion_only_loss": False}],
    ids=str,
)
def test_marks_and_prefixes_agree(name, settings):
    plain, marked = templates(name)
    tokenizer = MAKERS[name]()
    one = render({"messages": TALK}, tokenizer, RenderSettings(chat_template=plain, **settings))
    two = render({"messages": TALK}, tokenizer, RenderSettings(chat_template=marked, **settings))
    assert one == two
    assert one.supervised


@pytest.mark.parametrize("name", SHAPES)
def test_marks_are_what_transformers_makes_of_them(name):
    _, marked = templates(name)
    tokenizer = MAKERS[name](template=marked)
    talk = [{**message, "content": message["content"].strip()} for message in TALK]  # no token straddles a cut
    theirs = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ours = render({"messages": talk}, tokenizer)
    n = len(ours.input_ids)  # the white space behind the last turn is left out
    assert theirs["input_ids"][:n] == ours.input_ids
    assert theirs["assistant_masks"][:n] == [int(label != IGNORE) for label in ours.labels]
    assert not any(theirs["assistant_masks"][n:])
    assert [id_ for id_ in ours.labels if id_ == tokenizer.eos_token_id] == [tokenizer.eos_token_id] * 2


def test_an_end_of_turn_that_the_marks_leave_out_is_learned_all_the_same():
    plain, _ = templates("chatml")
    short = SHAPES["chatml"].replace("{B}", "{% generation %}").replace("</s>{E}", "{% endgeneration %}</s>")
    tokenizer = byte_level()
    for settings in ({}, {"last_turn_only_loss": True}):
        expected = render({"messages": TALK}, tokenizer, RenderSettings(chat_template=plain, **settings))
        assert render({"messages": TALK}, tokenizer, RenderSettings(chat_template=short, **settings)) == expected


def test_marks_take_the_place_of_a_generation_prompt_that_a_template_lacks():
    _, marked = templates("chatml")
    lacking = marked.partition("{% if add_generation_prompt %}")[0]
    tokenizer = byte_level()
    made = render({"messages": TALK}, tokenizer, RenderSettings(chat_template=lacking))
    plain, _ = templates("chatml")
    assert made == render({"messages": TALK}, tokenizer, RenderSettings(chat_template=plain))


def test_only_the_marked_part_of_an_answer_is_learned():
    marked = SHAPES["chatml"].replace("{B}{{ m.content }}", "{{ m.content[:3] }}{B}{{ m.content[3:] }}")
    marked = marked.replace("{B}", "{%- generation -%}").replace("{E}", "{%- endgeneration -%}")
    tokenizer = byte_level(template=marked)
    made = render({"messages": TALK}, tokenizer, RenderSettings(last_turn_only_loss=True))
    assert tokenizer.decode([label for label in made.labels if label != IGNORE]) == " second \n</s>"


def test_marks_that_leave_out_an_answer_are_refused():
    marked = templates("chatml")[1].replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    tokenizer = byte_level(template=marked)
    with pytest.raises(DataError, match="leave out message 2"):
        render({"messages": TALK}, tokenizer)
    assert render({"messages": TALK}, tokenizer, RenderSettings(last_turn_only_loss=True)).supervised


def test_marks_do_not_excuse_a_template_that_rewrites_turns():
    marked = templates("chatml")[1].replace("{{ m.content }}</s>{%", "{{ m.content if loop.last else '...' }}</s>{%")
    tokenizer = byte_level(template=marked)
    with pytest.raises(DataError, match="rewrites earlier turns"):
        render({"messages": TALK}, tokenizer)
    row = {"messages": TALK}
    made = render(row, tokenizer, RenderSettings(last_turn_only_loss=True))
    prompt = render_prompt(row, tokenizer)
    assert made.input_ids[: len(prompt)] == prompt


def test_a_template_that_fails_with_marks_is_one_clear_error():
    tokenizer = byte_level(template="{% generation %}{{ raise_exception('no') }}{% endgeneration %}")
    with pytest.raises(DataError, match=r"refuses a conversation of roles .*: no"):
        render({"messages": TALK}, tokenizer)


def test_several_answers_to_one_prompt_count_the_last_only_when_asked():
    tokenizer = byte_level(template=templates("chatml")[0])
    row = {"prompt": TALK[:2], "completion": TALK[2:]}
    every, last = (render(row, tokenizer, RenderSettings(last_turn_only_loss=flag)) for flag in (False, True))
    assert every.input_ids == last.input_ids
    assert every.supervised > last.supervised > 0
    assert tokenizer.decode([label for label in last.labels if label != IGNORE]) == "the second \n</s>"
