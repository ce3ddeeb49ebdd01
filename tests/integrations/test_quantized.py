"""A base in four bits under transformers' own Trainer and under TRL: accepted, trained, and generating."""

from __future__ import annotations

from pathlib import Path

import bnb  # noqa: F401 (imported here first, offline and quietly)
import pytest
import torch
import trl
from datasets import Dataset
from tinychat import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.trainer_utils import validate_quantization_for_training

from deltaw import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    NF4Config,
    NF4Linear,
    get_peft_model,
    load_model,
    prepare_model_for_kbit_training,
)

# TRL 1.16 switches checkpointing under the names that transformers 5.23 calls old
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

LORA = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
NESTED = NF4Config(bnb_4bit_use_double_quant=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapted(base):
    return get_peft_model(prepare_model_for_kbit_training(load_model(base, quantization_config=NESTED)), LORA)


def arguments(tmp_path: Path) -> dict:
    return {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }


def trained(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_transformers_lets_it_train_and_not_without_adapters(base, adapted):
    validate_quantization_for_training(adapted)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(load_model(base, quantization_config=NESTED))


def test_transformers_trainer(adapted, tmp_path):
    ids = torch.arange(3, 35).reshape(4, 8)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    before = trained(adapted)
    packed = {n: p.clone() for n, p in adapted.named_parameters() if p.dtype == torch.uint8}
    trainer = Trainer(adapted, TrainingArguments(**arguments(tmp_path)), train_dataset=rows)  # type: ignore[arg-type]
    assert trainer.train().training_loss > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trained(adapted), strict=True))
    assert all(torch.equal(packed[n], p) for n, p in adapted.named_parameters() if n in packed)


@pytest.mark.parametrize("loaded", ["here", "with bitsandbytes"])
def test_trl_sft_trainer(base, adapted, tmp_path, loaded):
    if loaded == "with bitsandbytes":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
        adapted = get_peft_model(prepare_model_for_kbit_training(theirs), LORA)
    rows = Dataset.from_list([{"text": f"say {i} {i}!"} for i in range(8)])
    before = trained(adapted)
    config = trl.SFTConfig(**arguments(tmp_path), max_length=32)
    trainer = trl.SFTTrainer(adapted, config, train_dataset=rows, processing_class=tiny_tokenizer())
    assert trainer.train().training_loss > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trained(adapted), strict=True))
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_auto_loads_the_base_in_4_bits_and_a_base_of_4_bits(base, adapted, tmp_path, ids):
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=NESTED)
    assert torch.equal(again(ids).logits, adapted(ids).logits)
    load_model(base, quantization_config=NESTED).save_pretrained(tmp_path / "packed")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "packed")
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(again.get_base_model().get_submodule("model.layers.0.mlp.up_proj").base_layer, NF4Linear)
    assert torch.equal(again(ids).logits, adapted(ids).logits)


def test_generation_with_an_adapter(adapted, ids):
    prompt = ids[:, :5]
    adapted.eval()
    out = adapted.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > prompt.shape[1]
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=prompt).logits[:, -1].argmax(-1), out[:, prompt.shape[1]])
