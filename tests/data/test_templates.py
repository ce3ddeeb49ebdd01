"""The templates by name: what they write, what they need, what is learned of it; and templates that are refused."""

from __future__ import annotations

import json

import pytest
from chattokenizers import byte_level, llama_like
from transformers import AutoTokenizer

from deltaw.data import IGNORE, RenderSettings, render, render_prompt, stop_token_ids
from deltaw.data.templates import TEMPLATES, resolve_template, template_text, use_template
from deltaw.errors import ConfigError, DataError
from deltaw.loading import load_tokenizer

SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "mistral": ["[INST]", "[/INST]"],
    "zephyr": [],
    "alpaca": [],
}
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]
WRITTEN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nA2<|im_end|>",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU1"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nU2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
    "gemma": "<start_of_turn>user\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n<start_of_turn>user\nU2"
    "<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nU2<|end|>\n<|assistant|>\n"
    "A2<|end|>",
    "mistral": "[INST] S\n\nU1[/INST] A1</s>[INST] U2[/INST] A2</s>",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n<|assistant|>\nA2</s>",
    "alpaca": "S\n\n### Instruction:\nU1\n\n### Response:\nA1</s>\n\n### Instruction:\nU2\n\n### Response:\nA2</s>",
}
CLOSING = {
    "chatml": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
}
TOOL = {"type": "function", "function": {"name": "add", "description": "sums", "parameters": {"type": "object"}}}
CALLS = [
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "It is 5."},
]


def tokenizer_for(name, bos=True):
    special = ["<s>", "</s>", *SPECIAL[name]]
    return byte_level(special, bos="<s>", adds_bos=True) if bos else byte_level(special)


def messages_for(name):
    return TALK[1:] if name == "gemma" else TALK


def runs(rendered, tokenizer):
    """The supervised stretches, each decoded."""
    found, previous = [], IGNORE
    for label in rendered.labels:
        if label != IGNORE:
            found += [[]] if previous == IGNORE else []
            found[-1].append(label)
        previous = label
    return [tokenizer.decode(run) for run in found]


def test_all_of_them_are_tested():
    assert set(WRITTEN) == set(SPECIAL) == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("bos", [True, False])
def test_what_is_written_and_what_is_learned_of_it(name, bos):
    tokenizer = tokenizer_for(name, bos)
    messages, closing = messages_for(name), CLOSING.get(name, "</s>")
    settings = RenderSettings(chat_template=name, last_turn_only_loss=True)
    made = render({"messages": messages}, tokenizer, settings)
    assert tokenizer.decode(made.input_ids) == ("<s>" if bos else "") + WRITTEN[name]
    head = {"mistral": " ", "qwen3": "<think>\n\n</think>\n\n"}.get(name, "")
    assert runs(made, tokenizer) == [f"{head}A2{closing}"]
    prompt = render_prompt({"messages": messages}, tokenizer, settings)
    assert made.input_ids[: len(prompt)] == prompt
    assert made.labels[len(prompt)] != IGNORE
    assert stop_token_ids(tokenizer, name) == list(dict.fromkeys([1, tokenizer.convert_tokens_to_ids(closing)]))
    if name == "qwen3":
        return
    every = RenderSettings(chat_template=name)
    assert runs(render({"messages": messages}, tokenizer, every), tokenizer) == [
        f"{head}A1{closing}",
        f"{head}A2{closing}",
    ]
    whole = render({"messages": messages}, tokenizer, RenderSettings(chat_template=name, completion_only_loss=False))
    assert whole.labels == [IGNORE, *whole.input_ids[1:]]
    first = render_prompt({"messages": messages[:-2]}, tokenizer, every)
    assert whole.input_ids[: len(first)] == first


def test_qwen3_shows_the_thoughts_of_the_last_turn_only():
    tokenizer = tokenizer_for("qwen3", bos=False)
    talk = [
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1", "reasoning_content": "first"},
        {"role": "user", "content": "U2"},
        {"role": "assistant", "content": "<think>\nsecond\n</think>\n\nA2"},
    ]
    last = render({"messages": talk}, tokenizer, RenderSettings(chat_template="qwen3", last_turn_only_loss=True))
    assert runs(last, tokenizer) == ["<think>\nsecond\n</think>\n\nA2<|im_end|>"]
    assert "first" not in tokenizer.decode(last.input_ids)
    with pytest.raises(DataError, match=r"rewrites earlier turns.*last_turn_only_loss: true"):
        render({"messages": talk}, tokenizer, RenderSettings(chat_template="qwen3"))
    # one question, then calls and their results: no turn is rewritten, so all are learned
    settings = RenderSettings(chat_template="qwen3")
    thought = [dict(message) for message in CALLS]
    thought[1]["reasoning_content"] = "I must add"
    thought[3]["reasoning_content"] = "done"
    made = runs(render({"messages": thought, "tools": [TOOL]}, tokenizer, settings), tokenizer)
    assert [run.partition("\n</think>")[0] for run in made] == ["<think>\nI must add", "<think>\ndone"]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("chatml", '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'),
        ("llama3", '{"name": "add", "parameters": {"a": 2, "b": 3}}<|eot_id|>'),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": 3}}]</s>'),
    ],
)
def test_tools_calls_and_results_are_rendered_and_calls_are_learned(name, call):
    tokenizer = tokenizer_for(name)
    settings = RenderSettings(chat_template=name)
    for system in ([], [{"role": "system", "content": "S"}]):
        made = render({"messages": [*system, *CALLS], "tools": [TOOL]}, tokenizer, settings)
        text = tokenizer.decode(made.input_ids)
        assert runs(made, tokenizer)[0] == call
        assert "It is 5." in runs(made, tokenizer)[1]
        assert text.count("sums") == 1
        assert (
            text.index("sums") < text.index("2+3?") < text.index('"a": 2') < text.index("5", text.index('"b": 3') + 8)
        )
        assert text.count("<s>") == 1
        if system:
            assert text.count("S") >= 1
            assert text.index("S") < text.index("2+3?")
    written = [CALLS[0], json.loads(json.dumps(CALLS[1])), *CALLS[2:]]
    written[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 2, "b": 3}'  # as OpenAI's API writes them
    assert render({"messages": written}, tokenizer, settings) == render({"messages": CALLS}, tokenizer, settings)


@pytest.mark.parametrize("name", ["gemma", "phi3", "zephyr", "alpaca"])
def test_templates_without_tools_refuse_them(name):
    tokenizer = tokenizer_for(name)
    settings = RenderSettings(chat_template=name)
    with pytest.raises(DataError, match=f"the template {name} has no tool role"):
        render({"messages": CALLS}, tokenizer, settings)
    with pytest.raises(DataError, match=r"leaves out the tools \['add'\]"):
        render({"messages": messages_for(name), "tools": [TOOL]}, tokenizer, settings)


def test_gemma_says_that_it_has_no_system_role():
    with pytest.raises(DataError, match=r"no system role; write a system message as the first lines of the first user"):
        render({"messages": TALK}, tokenizer_for("gemma"), RenderSettings(chat_template="gemma"))


def test_mistral_says_where_a_system_message_may_stand():
    odd = [TALK[1], TALK[0], *TALK[2:]]
    with pytest.raises(DataError, match="into the first user message, which must follow it"):
        render({"messages": odd}, tokenizer_for("mistral"), RenderSettings(chat_template="mistral"))


@pytest.mark.parametrize("name", [name for name, special in SPECIAL.items() if special and name != "mistral"])
def test_tokens_that_a_template_is_made_of_and_the_tokenizer_lacks_are_named(name):
    bare = byte_level()
    with pytest.raises(ConfigError) as error:
        resolve_template(name, bare)
    assert str(SPECIAL[name]) in str(error.value)
    with pytest.raises(ConfigError, match="the tokenizer lacks"):
        render({"messages": messages_for(name)}, bare, RenderSettings(chat_template=name))
    bare.eos_token = None
    with pytest.raises(ConfigError, match=r"lacks \['eos_token'\]"):
        resolve_template("alpaca", bare)


def test_names_files_and_texts(tmp_path):
    tokenizer = tokenizer_for("chatml")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}", encoding="utf-8")
    assert resolve_template(str(file), tokenizer) == "{{ messages[0].content }}"
    assert resolve_template("{{ 1 }}", tokenizer) == "{{ 1 }}"
    assert resolve_template("chatml", tokenizer).startswith("{{ bos_token }}{#- needs:")
    assert resolve_template("chatml", tokenizer_for("chatml", bos=False)).startswith("{#- needs:")
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        resolve_template("chatlm", tokenizer)
    with pytest.raises(ConfigError, match=r"did you mean 'mine\.jinja'"):
        resolve_template(str(tmp_path / "mime.jinja"), tokenizer)
    binary = tmp_path / "binary.jinja"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_template(str(binary), tokenizer)
    assert template_text(tokenizer) is None
    tokenizer.chat_template = {"default": "{{ 2 }}", "tool_use": "{{ 3 }}"}
    assert template_text(tokenizer) == "{{ 2 }}"
    assert template_text(tokenizer, None, [TOOL]) == "{{ 3 }}"


def test_a_template_is_saved_with_the_tokenizer(tmp_path):
    tokenizer = tokenizer_for("chatml")
    expected = render_prompt({"messages": TALK}, tokenizer, RenderSettings(chat_template="chatml"))
    use_template(tokenizer, "chatml").save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert render_prompt({"messages": TALK}, again) == expected
    assert load_tokenizer(tmp_path, chat_template="alpaca").chat_template == resolve_template("alpaca", again)
    assert use_template(again, None) is again


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{% for x in %}",
    ],
)
def test_a_template_can_reach_and_change_nothing(attack):
    talk = [dict(message) for message in TALK]
    with pytest.raises(DataError, match="the chat template refuses"):
        render({"messages": talk}, byte_level(), RenderSettings(chat_template=attack))
    assert talk == TALK


def test_bos_is_written_once_and_twice_is_refused():
    tokenizer = llama_like("{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}{{ eos_token }}{% endfor %}")
    made = render({"messages": TALK[:3]}, tokenizer, RenderSettings(completion_only_loss=False))
    assert made.input_ids.count(1) == 1
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    with pytest.raises(DataError, match="writes BOS twice"):
        render({"messages": TALK[:3]}, tokenizer)
