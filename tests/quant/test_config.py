"""NF4Config beside BitsAndBytesConfig: the same names, the same values, and what is refused."""

import json

import pytest
import torch
from transformers import BitsAndBytesConfig

from deltaw import NF4Config
from deltaw.errors import ConfigError

QLORA = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


def test_the_usual_script_changes_only_its_import():
    ours, theirs = NF4Config(**QLORA), BitsAndBytesConfig(**QLORA)
    for name in (*QLORA, "bnb_4bit_quant_storage", "llm_int8_skip_modules", "load_in_8bit"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.quantization_method() == theirs.quantization_method()
    assert ours.is_quantizable()


def test_the_script_of_the_paper_passes():
    """It gives the fields of 8 bits as well."""
    NF4Config(load_in_8bit=False, llm_int8_threshold=6.0, llm_int8_has_fp16_weight=False, **QLORA)


def test_every_name_of_theirs_is_known():
    known = set(NF4Config().to_dict())
    assert {name.removeprefix("_") for name in BitsAndBytesConfig().to_dict()} <= known


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_or_its_name(dtype):
    config = NF4Config(bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype)
    assert config.bnb_4bit_compute_dtype is config.bnb_4bit_quant_storage is torch.bfloat16


def test_nothing_is_the_default():
    config = NF4Config(bnb_4bit_quant_storage=None)
    assert config.bnb_4bit_quant_storage is torch.uint8
    assert config.bnb_4bit_compute_dtype is None  # that of the input


def test_all_faults_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        NF4Config(
            load_in_8bit=True,
            bnb_4bit_quant_type="nf5",
            bnb_4bit_blocksize=48,
            bnb_4bit_compute_dtype="int8",
            bnb_4bit_quant_storage="int3",
            bnb_4bit_use_double_quant="yes",  # type: ignore[arg-type]
            llm_int8_skip_modules="lm_head",  # type: ignore[arg-type]
            llm_int8_has_fp16_weight=True,
        )
    said = str(caught.value)
    for part in (
        "load_in_8bit=True",
        "did you mean 'nf4'",
        "bnb_4bit_blocksize=48",
        "bnb_4bit_compute_dtype='int8'",
        "bnb_4bit_quant_storage='int3'",
        "bnb_4bit_use_double_quant='yes'",
        "llm_int8_skip_modules='lm_head'",
        "llm_int8_has_fp16_weight=True",
    ):
        assert part in said, part


def test_four_bits_are_what_it_is_for():
    with pytest.raises(ConfigError, match="load_in_4bit=False: without it nothing is quantized"):
        NF4Config(load_in_4bit=False)


def test_through_json_and_back():
    config = NF4Config(**QLORA, llm_int8_skip_modules=["lm_head"], bnb_4bit_blocksize=128)
    assert NF4Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert NF4Config.from_dict(json.loads(config.to_json_string())) == config
    assert "bfloat16" in repr(config)


def test_the_short_form_holds_what_differs():
    assert set(NF4Config().to_diff_dict()) == {"quant_method", "load_in_4bit"}
    assert NF4Config(bnb_4bit_quant_type="fp4").to_diff_dict()["bnb_4bit_quant_type"] == "fp4"


def test_what_bitsandbytes_wrote_is_read_and_the_other_way_round():
    theirs = BitsAndBytesConfig(**QLORA, llm_int8_skip_modules=["lm_head"])
    ours = NF4Config.from_dict(json.loads(json.dumps(theirs.to_dict(), default=str)))
    assert (ours.bnb_4bit_use_double_quant, ours.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    back = BitsAndBytesConfig.from_dict(ours.to_dict())
    assert back.to_dict() == theirs.to_dict()


def test_a_file_may_say_how_8_bit_layers_would_run():
    written = BitsAndBytesConfig(**QLORA, llm_int8_enable_fp32_cpu_offload=True).to_dict()
    assert NF4Config.from_dict(written) == NF4Config(**QLORA)


def test_a_file_in_8_bits_is_refused():
    with pytest.raises(ConfigError, match="load_in_8bit=True"):
        NF4Config.from_dict(BitsAndBytesConfig(load_in_8bit=True).to_dict())


def test_a_key_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match=r"'bnb_4bit_quant_typ'; did you mean 'bnb_4bit_quant_type'"):
        NF4Config.from_dict({"bnb_4bit_quant_typ": "nf4"})


def test_unused_arguments_are_given_back():
    config, unused = NF4Config.from_dict({}, return_unused_kwargs=True, bnb_4bit_quant_type="fp4", device_map="auto")
    assert config.bnb_4bit_quant_type == "fp4"
    assert unused == {"device_map": "auto"}
