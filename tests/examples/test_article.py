"""The article's programs, each run whole on a tiny random Llama, and the parameter counts it prints."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tinychat import save_tiny
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from article import basic_lora, load_and_generate, qlora, sft_alpaca, templates
from deltaw import PRESETS, LoraConfig, NF4Linear, PeftModel, get_peft_model
from deltaw.data import load_rows

ALL_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TINY_ALL_LINEAR = 16_384  # 2 layers x 16 x (q 64 + k 48 + v 48 + o 64 + three of the MLP at 96)
LINE = re.compile(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+) \|\| trainable%: (\d+\.\d{4})\n")


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("article-base")))


@pytest.fixture(scope="session")
def tuned(base, tmp_path_factory):
    """sft_alpaca.py, run to its end: (trainer, folder)."""
    folder = tmp_path_factory.mktemp("article")
    return sft_alpaca.main([base, "--output", str(folder)]), folder


def number(text: str) -> int:
    return int(text.replace(",", ""))


# --- 7.2 ------------------------------------------------------------------------------------------------------------


def test_basic_lora_prints_what_it_trains(base, capsys):
    model = basic_lora.main([base])
    found = LINE.search(capsys.readouterr().out)
    assert found
    everything = sum(p.numel() for p in model.parameters())
    assert number(found[1]) == TINY_ALL_LINEAR
    assert number(found[2]) == everything
    assert found[3] == f"{100 * TINY_ALL_LINEAR / everything:.4f}"
    assert {p.dtype for p in model.get_base_model().parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert not any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_program_runs_as_a_script(base, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["basic_lora.py", base])
    runpy.run_path(basic_lora.__file__, run_name="__main__")
    assert LINE.search(capsys.readouterr().out)


def test_a_device_map_changes_nothing(base, ids, tmp_path):
    """Adapters on a base that accelerate has placed: the same numbers, trained, saved, merged and loaded."""

    def load(**where):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, **where).eval()
        return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()

    plain, placed = load(), load(device_map="auto")
    expected = plain(ids).logits
    assert torch.equal(placed(ids).logits, expected)
    placed(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in placed.parameters() if p.requires_grad)

    placed.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(base, device_map="auto").eval()
    assert torch.equal(PeftModel.from_pretrained(again, tmp_path).eval()(ids).logits, expected)
    torch.testing.assert_close(placed.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


# --- 7.3 ------------------------------------------------------------------------------------------------------------


def test_sft_leaves_an_adapter_and_a_checkpoint(tuned, base):
    trainer, folder = tuned
    adapter = folder / "lora-adapter"
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert sorted(config["target_modules"]) == sorted(ALL_SEVEN)
    assert config["base_model_name_or_path"] == base
    assert (adapter / "tokenizer_config.json").exists()
    assert not list(adapter.glob("model*"))  # the base is not saved again

    tensors = load_file(adapter / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == TINY_ALL_LINEAR
    assert all(t.any() for t in tensors.values())  # each B has left zero: every layer was trained
    assert trainer.state.global_step == 3  # 40 rows, 16 a step, the last step a short one
    assert (folder / "lora-output" / "checkpoint-3" / "adapter_model.safetensors").exists()


def test_the_older_names_are_taken(tuned):
    trainer, _ = tuned
    assert trainer.args.max_length == 2048
    assert trainer.model.get_base_model().dtype == torch.float32  # the checkpoint's, in spite of bf16=True


def test_the_text_column_does_not_win(tuned):
    """The loss covers the answers and their end, and nothing of the prompts."""
    trainer, _ = tuned
    rows = load_rows(str(sft_alpaca.SAMPLE))
    assert len(rows) == 40
    assert all(set(row) == {"instruction", "input", "output", "text"} for row in rows)
    tokenizer = trainer.processing_class
    for row, example in zip(rows, trainer.train_dataset, strict=True):
        answer = tokenizer.decode([label for label in example["labels"] if label != -100])
        assert answer.rstrip("\n") == row["output"] + "<|im_end|>"
        assert row["instruction"] in tokenizer.decode(example["input_ids"])


def test_a_dataset_of_the_datasets_library_is_the_same_run(tuned, base, tmp_path):
    """As the article writes it: load_dataset(...), by a name or from a file."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(
        "json", data_files=str(sft_alpaca.SAMPLE), split="train", cache_dir=str(tmp_path / "cache")
    )
    trainer, _ = tuned
    again = sft_alpaca.SFTTrainer(
        model=base,
        args=sft_alpaca.SFTConfig(output_dir=str(tmp_path / "out"), max_length=2048),
        train_dataset=rows,
        peft_config=LoraConfig(target_modules=ALL_SEVEN, task_type="CAUSAL_LM"),
    )
    assert list(again.train_dataset) == list(trainer.train_dataset)


# --- 7.4 ------------------------------------------------------------------------------------------------------------


def test_qlora_trains_over_four_bits_and_counts_weights(base, capsys):
    model = qlora.main([base])
    found = LINE.search(capsys.readouterr().out)
    assert found
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert len(layers) == 14
    assert {(layer.quant_type, layer.packed.nested, layer.compute_dtype) for layer in layers} == {
        ("nf4", True, torch.bfloat16)
    }
    dense = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(base).parameters())
    assert number(found[1]) == TINY_ALL_LINEAR
    assert number(found[2]) == dense + TINY_ALL_LINEAR  # packed bytes count as the weights that they hold
    ids = torch.arange(2, 18)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == TINY_ALL_LINEAR
    assert all(p.grad is not None for p in trained)


# --- 7.5 ------------------------------------------------------------------------------------------------------------


def test_the_adapter_is_loaded_merged_and_asked(tuned, base, capsys):
    adapter = str(tuned[1] / "lora-adapter")
    text = load_and_generate.main([base, "--adapter", adapter, "--max-new-tokens", "8"])
    out = capsys.readouterr().out
    assert text.startswith("The future of AI is")
    assert len(text) > len("The future of AI is")
    assert f"LORA adapter, trained on {base}" in out
    assert text in out


def test_a_missing_adapter_is_said_before_the_model_loads(base, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load_and_generate.main(["no-such-model", "--adapter", str(tmp_path / "nowhere")])


# --- 9.7 ------------------------------------------------------------------------------------------------------------


def test_the_presets_are_the_templates():
    assert PRESETS.keys() == templates.TEMPLATES.keys()
    for name, template in templates.TEMPLATES.items():
        assert LoraConfig(**PRESETS[name], task_type="CAUSAL_LM") == template  # type: ignore[arg-type]
    assert templates.config_high_performance.use_rslora


def test_templates_counts_without_weights(base, capsys):
    counts = templates.main([base])
    assert counts == {
        "standard": TINY_ALL_LINEAR,
        "memory_efficient": 2 * 8 * (64 + 48),
        "high_performance": 4 * TINY_ALL_LINEAR,
    }
    out = capsys.readouterr().out
    assert "NOT" not in out
    assert len(out.splitlines()) == 3


# --- the numbers that the article prints -----------------------------------------------------------------------------


@pytest.fixture
def llama_2_7b() -> LlamaForCausalLM:
    """The shapes of Llama-2-7b, without a byte of its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, vocab_size=32000))


@pytest.mark.parametrize(
    ("r", "targets", "trainable", "everything"),
    [
        (16, "all-linear", 39_976_960, 6_778_392_576),  # what 7.2 asks for
        (8, "all-linear", 19_988_480, 6_758_404_096),  # the total that 7.2 prints
        (8, [*ALL_SEVEN, "lm_head"], 20_277_248, 6_758_692_864),  # what 7.2 and 5.1 call trainable
        (8, ["q_proj", "v_proj"], 4_194_304, 6_742_609_920),  # where 5.1 starts from
    ],
)
def test_the_counts_of_llama_2_7b(llama_2_7b, r, targets, trainable, everything):
    assert llama_2_7b.num_parameters() == 6_738_415_616
    with torch.device("meta"):
        model = get_peft_model(llama_2_7b, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters() == (trainable, everything)
    assert all(p.is_meta for p in model.parameters())


def test_the_sample_is_utf8_jsonl_without_duplicates():
    lines = Path(sft_alpaca.SAMPLE).read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == 40
