"""The model card beside an adapter."""

import sys

import yaml

import deltaw
from deltaw import LoraConfig
from deltaw.card import write_card
from deltaw.report.runcard import PICTURE, write_run_card


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


def test_a_built_in_base_is_loaded_by_deltaw_and_is_none_of_the_hub(tmp_path):
    write_card(tmp_path, LoraConfig(base_model_name_or_path="smollm2-135m", task_type="CAUSAL_LM"))
    values, text = header(tmp_path)
    assert "base_model" not in values
    assert not any(tag.startswith("base_model:") for tag in values["tags"])
    program = text.split("```python\n")[1].split("```")[0]
    assert "base = load_model('smollm2-135m')" in program
    assert "transformers" not in program


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


# --- the card of a run

RESULTS = {
    "train_loss": 1.25, "eval_loss": 0.75, "eval_perplexity": 2.117, "eval_exact_match": 0.5, "train_runtime": 12.0,
    "train_tokens": 12345, "base_model": "org/base", "base_fingerprint": "b" * 64, "base_revision": None,
    "dataset_fingerprint": "d" * 64, "template_fingerprint": "t" * 64, "versions": {"python": "3.11", "torch": "2.13"},
}  # fmt: skip
HISTORY = [
    *({"step": step, "loss": 3.0 / step, "learning_rate": 1e-4 / step} for step in range(1, 9)),
    {"step": 3, "loss": float("nan"), "learning_rate": 1e-4},
    {"step": 8, "eval_loss": 0.75},
    {"step": 8, "train_runtime": 12.0},
]
CONFIG = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="org/base")


def test_a_run_tells_where_the_adapter_comes_from(tmp_path):
    write_card(tmp_path, CONFIG)  # as saving the adapter does
    proof = ["Read back onto a fresh base, it equals the trained model bit for bit."]
    assert write_run_card(tmp_path, CONFIG, RESULTS, HISTORY, proof=proof, command="deltaw train run.yaml --r 4")
    values, text = header(tmp_path)
    assert values["base_model"] == "org/base"
    for line in (
        "| training loss, mean over the run | 1.2500 |",
        "| evaluation loss | 0.7500 |",
        "| evaluation answers right | 50.0% |",
        "| tokens | 12,345 |",
        "| base model | `org/base` |",
        f"| base hash | `{'b' * 64}` |",
        f"| data fingerprint | `{'d' * 64}` |",
        f"| chat template hash | `{'t' * 64}` |",
        "| versions | python 3.11, torch 2.13 |",
        "deltaw train run.yaml --r 4",
        f"- {proof[0]}",
        f"![Training loss by step]({PICTURE})",
    ):
        assert line in text, line
    assert "base revision" not in text
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert write_run_card(tmp_path, CONFIG, {**RESULTS, "train_loss": 9.0}, HISTORY)
    assert "9.0000" in header(tmp_path)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", PICTURE]


def test_a_run_leaves_the_card_of_a_user_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert not write_run_card(tmp_path, CONFIG, RESULTS, HISTORY)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_without_matplotlib_or_losses_the_card_has_no_picture(tmp_path, monkeypatch):
    assert write_run_card(tmp_path, CONFIG, RESULTS, [{"step": 1, "loss": float("nan")}])
    assert PICTURE not in header(tmp_path)[1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_run_card(tmp_path, CONFIG, RESULTS, HISTORY)
    assert PICTURE not in header(tmp_path)[1]
    assert not (tmp_path / PICTURE).exists()


def test_a_bar_in_a_value_breaks_no_table(tmp_path):
    write_run_card(tmp_path, CONFIG, {**RESULTS, "base_model": "a|b"}, [])
    assert "| base model | `a\\|b` |" in header(tmp_path)[1]
