"""The model card beside an adapter."""

import yaml

import deltaw
from deltaw import LoraConfig
from deltaw.card import write_card


def header(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_the_header_is_what_the_hub_reads(tmp_path):
    config = LoraConfig(
        r=4, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="org/base"
    )
    write_card(tmp_path, config)
    values, text = header(tmp_path)
    assert values["base_model"] == "org/base"
    assert values["library_name"] == "peft"
    assert values["pipeline_tag"] == "text-generation"
    assert {"base_model:adapter:org/base", "lora", "transformers"} <= set(values["tags"])
    assert "| r | 4 |" in text
    assert "| target_modules | q_proj, v_proj |" in text
    assert "use_rslora" not in text  # only what was set
    assert "from_pretrained('org/base')" in text


def test_a_folder_of_this_machine_is_not_announced_as_a_base_of_the_hub(tmp_path):
    write_card(tmp_path, LoraConfig(base_model_name_or_path=str(tmp_path)))
    values, _ = header(tmp_path)
    assert "base_model" not in values
    assert not any(tag.startswith("base_model:") for tag in values["tags"])
    assert "pipeline_tag" not in values


def test_a_quote_in_a_name_stays_yaml(tmp_path):
    write_card(tmp_path, LoraConfig(base_model_name_or_path='org/it\'s: "b"'))
    assert header(tmp_path)[0]["base_model"] == 'org/it\'s: "b"'


def test_a_card_that_is_there_is_the_user_s(tmp_path, llama):
    (tmp_path / "README.md").write_text("mine")
    deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_unnamed_base_still_gives_a_card(tmp_path, llama):
    deltaw.get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    values, text = header(tmp_path)
    assert values["library_name"] == "peft"
    assert "its base model" in text
