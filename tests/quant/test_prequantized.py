"""What a config says of how its weights are kept, and what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaw import NF4Config, load_model
from deltaw.errors import ModelError
from deltaw.quant.prequantized import quantization_of

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_weights_in_full_say_nothing():
    assert quantization_of({}, "m") is None
    assert quantization_of({"quantization_config": None, "text_config": {}}, "m") is None


@pytest.mark.parametrize("where", [lambda said: said, lambda said: {"text_config": said}], ids=["own", "inside"])
def test_four_bits_of_bitsandbytes_are_read(where):
    found = quantization_of(where({"quantization_config": FOUR | {"bnb_4bit_use_double_quant": True}}), "m")
    assert isinstance(found, NF4Config)
    assert found.bnb_4bit_use_double_quant


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized with gptq, .*NF4Config"),
        ({"quant_method": "awq"}, "quantized with awq, .*load the model in full"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        ({"quant_method": "mxfp4"}, r"mxfp4, .*Mxfp4Config\(dequantize=True\)"),
        ({"quant_method": "fp8"}, r"FineGrainedFP8Config\(dequantize=True\)"),
    ],
)
def test_other_ways_are_refused_by_name_with_the_cure(tmp_path, said, told):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": said}))
    with pytest.raises(ModelError, match=told):
        load_model(tmp_path)


def test_a_folder_of_gguf_files_is_refused_with_the_cure(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"holds GGUF files.*gguf_file='model-Q4_K_M.gguf'.*dequantize=True"):
        load_model(tmp_path)


def test_the_files_decide_how_weights_are_packed_and_the_caller_how_they_compute(tmp_path, caplog):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    packed = load_model(tmp_path / "dense", quantization_config=NF4Config(bnb_4bit_quant_type="fp4"))
    packed.save_pretrained(tmp_path / "fp4")
    with caplog.at_level(logging.WARNING, logger="deltaw"):
        asked = NF4Config(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
        model = load_model(tmp_path / "fp4", quantization_config=asked)
    assert "4-bit weights already, with bnb_4bit_quant_type='fp4'" in caplog.text
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.quant_type, layer.compute_dtype) == ("fp4", torch.bfloat16)
