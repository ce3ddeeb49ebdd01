"""What becomes of examples that are too long: every way, and what each keeps."""

from __future__ import annotations

import pytest
from chattokenizers import byte_level
from hypothesis import given
from hypothesis import strategies as st

from deltaw.data import IGNORE, RenderSettings, render, render_examples, render_prompt
from deltaw.errors import ConfigError, DataError

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SYSTEM = {"role": "system", "content": "be short"}
TALK = [
    {"role": "user", "content": "the oldest question"},
    {"role": "assistant", "content": "the oldest answer"},
    {"role": "user", "content": "abcdefghij" * 3},
    {"role": "assistant", "content": "newest"},
]


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def tokenizer(request):
    made = byte_level(SPECIAL, bos="<s>", adds_bos=request.param)
    from deltaw.data.templates import use_template

    return use_template(made, "chatml")


def learned(rendered):
    return [label for label in rendered.labels if label != IGNORE]


def cut(row, tokenizer, length, **settings):
    return render_examples(row, tokenizer, RenderSettings(max_length=length, overlong="truncate_prompt", **settings))


def whole(row, tokenizer, **settings):
    return render(row, tokenizer, RenderSettings(max_length=None, **settings))


def test_settings_that_are_no_settings():
    with pytest.raises(ConfigError, match=r"overlong = 'cut' must be one of error, drop, truncate_prompt, truncate"):
        RenderSettings(overlong="cut")
    with pytest.raises(ConfigError, match="at least 2"):
        RenderSettings(max_length=1)


def test_what_fits_is_the_same_in_every_way(tokenizer):
    row = {"messages": TALK}
    expected = whole(row, tokenizer)
    for overlong in ("error", "drop", "truncate_prompt", "truncate"):
        for length in (len(expected.input_ids), None):
            assert render_examples(row, tokenizer, RenderSettings(max_length=length, overlong=overlong)) == [expected]


def test_dropped_and_cut_on_the_right(tokenizer):
    row = {"messages": TALK}
    expected = whole(row, tokenizer)
    n = len(expected.input_ids)
    assert render_examples(row, tokenizer, RenderSettings(max_length=n - 1, overlong="drop")) == []
    for overlong in ("truncate", "error"):
        (made,) = render_examples(row, tokenizer, RenderSettings(max_length=n - 2, overlong=overlong))
        assert made.input_ids == expected.input_ids[:-2]
        assert (made.length_before_truncation, made.cut_supervised) == (n, 2)


def test_the_prompt_loses_its_beginning_and_stays_a_conversation(tokenizer):
    row = {"messages": [SYSTEM, *TALK]}
    last = {"last_turn_only_loss": True}
    expected = whole(row, tokenizer, **last)
    shorter = {"messages": [SYSTEM, *TALK[2:]]}
    for n in range(len(expected.input_ids) - 1, len(whole(shorter, tokenizer).input_ids) - 30, -1):
        (made,) = cut(row, tokenizer, n, **last)
        assert learned(made) == learned(expected)
        assert made.length_before_truncation == len(expected.input_ids)
        assert made.cut_supervised == 0
        assert len(made.input_ids) <= n
        text = tokenizer.decode(made.input_ids)
        assert text.count("<|im_start|>") == text.count("<|im_end|>")
        assert "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\n" in text
        # what is left is what a shorter conversation would be: some user's turn without its beginning, and all after it
        left = text.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        at = 0 if TALK[0]["content"].endswith(left) else 2
        assert TALK[at]["content"].endswith(left)
        same = {"messages": [SYSTEM, {"role": "user", "content": left}, *TALK[at + 1 :]]}
        assert made.input_ids == whole(same, tokenizer, **last).input_ids
        assert made.input_ids[: len(render_prompt(same, tokenizer))] == render_prompt(same, tokenizer)
        if tokenizer.bos_token_id in render_prompt(row, tokenizer):
            assert made.input_ids.count(tokenizer.bos_token_id) == 1
            assert made.input_ids[0] == tokenizer.bos_token_id


def test_as_much_of_the_prompt_as_fits_is_kept(tokenizer):
    row = {"messages": TALK[2:]}
    n = len(whole(row, tokenizer).input_ids)
    for less in range(1, 30):
        (made,) = cut(row, tokenizer, n - less)
        assert len(made.input_ids) == n - less  # a letter is a token here


def test_supervised_turns_are_never_dropped(tokenizer):
    """All answers are learned: only the text before the first of them may go."""
    row = {"messages": [SYSTEM, *TALK]}
    expected = whole(row, tokenizer)
    n = len(expected.input_ids)
    (made,) = cut(row, tokenizer, n - 5)
    assert learned(made) == learned(expected)
    with pytest.raises(DataError, match=rf"does not fit into max_length={n - 40}, with the shortest prompt it has \d+"):
        cut(row, tokenizer, n - 40)


def test_an_answer_that_is_too_long_alone_is_an_error(tokenizer):
    for row in ({"messages": TALK[2:]}, {"prompt": "abc", "completion": "the answer, a long one"}):
        with pytest.raises(DataError, match=r"does not fit into max_length=8, .*overlong: drop"):
            cut(row, tokenizer, 8)
    with pytest.raises(DataError, match="it has no prompt that could be cut"):
        cut({"prompt": "", "completion": "abcdefghijk"}, tokenizer, 8)


def test_prompts_of_every_format(tokenizer):
    chat = {"prompt": [SYSTEM, *TALK[:3]], "completion": TALK[3:]}
    split = {"messages": [SYSTEM, *TALK]}
    n = len(whole(chat, tokenizer).input_ids) - 40
    assert cut(chat, tokenizer, n) == cut(split, tokenizer, n, last_turn_only_loss=True)
    alpaca = {"instruction": "abcdefghij" * 4, "output": "the end"}
    (made,) = cut(alpaca, tokenizer, 50)
    assert tokenizer.decode(learned(made)) == "the end<|im_end|>"
    assert len(made.input_ids) == 50
    text = {"prompt": "abcdefghij" * 4, "completion": "the end"}
    (made,) = cut(text, tokenizer, 30)
    assert len(made.input_ids) == 30
    assert learned(made) == learned(whole(text, tokenizer))
    assert made.input_ids[: len(tokenizer("")["input_ids"])] == tokenizer("")["input_ids"]  # BOS, where there is one


def test_a_prompt_that_is_learned_counts_as_lost(tokenizer):
    row = {"messages": TALK[2:]}
    n = len(whole(row, tokenizer).input_ids)
    (made,) = cut(row, tokenizer, n - 4, completion_only_loss=False)
    assert made.cut_supervised == 4


def test_control_tokens_in_a_prompt_that_is_cut(tokenizer):
    said = "<|im_end|>" * 4 + "abc"
    row = {"messages": [{"role": "user", "content": said}, TALK[3]]}
    n = len(whole(row, tokenizer).input_ids)
    (made,) = cut(row, tokenizer, n - 15)
    assert made.escaped == 4
    assert made.input_ids.count(3) == 2
    assert learned(made) == learned(whole(row, tokenizer))


@given(text=st.text(st.characters(codec="ascii"), max_size=60), length=st.integers(2, 20))
def test_a_document_is_learned_token_by_token_once(tokenizer, text, length):
    document = render({"text": text}, tokenizer, RenderSettings(max_length=None))
    made = render_examples({"text": text}, tokenizer, RenderSettings(max_length=length))
    assert [id_ for block in made for id_ in learned(block)] == learned(document)
    assert learned(document) == document.input_ids[1:]
    assert all(len(block.input_ids) <= length and block.cut_supervised == 0 for block in made)
    assert all(len(block.input_ids) == length for block in made[:-1])
    assert made[-1].input_ids[-1] == tokenizer.eos_token_id
    assert all(block.length_before_truncation == len(block.input_ids) for block in made)
    assert all(block.labels[0] == IGNORE for block in made)
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        assert all(block.input_ids[0] == tokenizer.bos_token_id for block in made)


def test_every_block_begins_with_bos_or_with_the_token_before_it():
    with_bos = byte_level(bos="<s>", adds_bos=True)
    made = render_examples({"text": "abcdefg"}, with_bos, RenderSettings(max_length=4))
    assert [with_bos.decode(block.input_ids) for block in made] == ["<s>abc", "<s>def", "<s>g</s>"]
    without = byte_level()
    made = render_examples({"text": "abcdefg"}, without, RenderSettings(max_length=4))
    assert [without.decode(block.input_ids) for block in made] == ["abcd", "defg", "g</s>"]
