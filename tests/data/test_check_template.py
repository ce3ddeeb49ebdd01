"""Whether chat sees what was trained on, and whether the tokenizer is the model's."""

import pytest
from tinychat import TEMPLATE, tiny_tokenizer
from transformers import LlamaConfig

from deltaw.data import Rendered, RenderSettings, TokenDataset, check_tokens, render_all
from deltaw.data.check_template import inserted_system_prompt

SETTINGS = RenderSettings()
ROWS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]} for i in range(5)
]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def check(rendered, tokenizer, settings=SETTINGS, rows=ROWS, **more):
    report = check_tokens(TokenDataset.of(rendered), tokenizer, settings, rows=rows, **more)
    return {finding.name: finding for finding in report.findings}


def test_tokens_that_the_rows_do_not_give_are_stale(tokenizer):
    rendered = render_all(ROWS, tokenizer)
    assert check(rendered, tokenizer).keys() == {"pad-is-eos"}
    stale = [*rendered[:3], rendered[4], rendered[3]]
    assert check(stale, tokenizer)["stale-tokens"].rows == (3, 4)
    unmasked = [Rendered(one.input_ids, one.input_ids, len(one.input_ids)) for one in rendered]
    assert check(unmasked, tokenizer)["stale-tokens"].count == 5


def test_a_template_that_is_not_the_tokenizers_is_not_what_chat_will_use(tokenizer):
    settings = RenderSettings(chat_template="Hello. " + TEMPLATE)
    rendered = render_all(ROWS, tokenizer, settings)
    assert check(rendered, tokenizer, settings)["template-not-saved"].level == "error"
    tokenizer.chat_template = settings.chat_template
    assert "template-not-saved" not in check(rendered, tokenizer, settings)


def test_a_prompt_that_begins_otherwise_when_it_is_asked(tokenizer, monkeypatch):
    rendered = render_all(ROWS, tokenizer)
    from deltaw.data import check_template

    real = check_template.render_prompt
    monkeypatch.setattr(check_template, "render_prompt", lambda *words: [*real(*words), 7])
    assert check(rendered, tokenizer)["template-differs"].count == 5


def test_the_real_models_own_system_prompt_is_shown(smol):
    assert "SmolLM" in str(inserted_system_prompt(smol))
    rendered = render_all(ROWS, smol)
    assert "named SmolLM" in check(rendered, smol)["system-prompt-inserted"].message
    given = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in ROWS]
    assert "system-prompt-inserted" not in check(render_all(given, smol), smol, rows=given)


@pytest.mark.parametrize("template", [TEMPLATE, "{{ messages[-1]['content'] }}", "{{ raise_exception('no') }}"])
def test_templates_that_insert_nothing(tokenizer, template):
    tokenizer.chat_template = template
    assert inserted_system_prompt(tokenizer) is None


def test_a_tokenizer_of_another_model(tokenizer):
    rendered = render_all(ROWS, tokenizer)
    config = LlamaConfig(vocab_size=100, eos_token_id=[5, 6], bos_token_id=None)
    found = check(rendered, tokenizer, model_config=config)
    assert found["outside-vocabulary"].level == "error"
    assert "eos is 1 to the tokenizer and 5, 6 to the model" in found["tokenizer-not-the-models"].message
    assert "258 tokens, the model 100" in found["tokenizer-not-the-models"].message
    small = check(rendered, tokenizer, vocab_size=1)
    assert "eos=1, pad=1" in small["special-outside-vocabulary"].message
    own = LlamaConfig(vocab_size=258, eos_token_id=1, bos_token_id=None)
    assert check(rendered, tokenizer, model_config=own).keys() == {"pad-is-eos"}
