"""AdaLoRA's settings: PEFT's fields and defaults, and what cannot work."""

import dataclasses

import peft
import pytest

from deltaw import AdaLoraConfig
from deltaw.errors import ConfigError

OURS = {
    "total_step",
    "peft_version",
    "runtime_config",
}  # PEFT fills in the last two, and has no config without the first


def test_the_fields_and_their_defaults_are_peft_s():
    ours, theirs = AdaLoraConfig(), peft.AdaLoraConfig(total_step=10)
    assert {f.name for f in dataclasses.fields(ours)} == {f.name for f in dataclasses.fields(theirs)}
    for field in dataclasses.fields(theirs):
        if field.name not in OURS:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.peft_type == "ADALORA"
    assert ours.method == "ADALORA"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_r": 0}, "init_r=0"),
        ({"target_r": 13}, "target_r=13.*1 to init_r=12"),
        ({"target_r": 0}, "target_r=0"),
        ({"tinit": -1}, "tinit=-1"),
        ({"tfinal": -1}, "tfinal=-1"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"beta1": 1.0}, "beta1=1.0"),
        ({"beta2": 0.0}, "beta2=0.0"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1"),
        ({"total_step": 0}, "total_step=0"),
        ({"total_step": 10, "tinit": 5, "tfinal": 5}, "tinit=5 and tfinal=5 leave none of the 10 steps"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "lora_alpha / init_r"),
        ({"lora_bias": True}, "lora_only"),
        ({"alpha_pattern": {"q_proj": 3}}, "one alpha"),
        ({"init_lora_weights": "gaussian"}, "a start of its own"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_named(fields, words):
    with pytest.raises(ConfigError, match=words):
        AdaLoraConfig(**fields)


def test_all_faults_come_at_once():
    with pytest.raises(ConfigError) as caught:
        AdaLoraConfig(beta1=2.0, deltaT=0, use_dora=True)
    assert len(str(caught.value).splitlines()) == 4


def test_a_file_may_hold_what_peft_ignored():
    values = peft.AdaLoraConfig(total_step=10, use_rslora=True, lora_bias=True, init_lora_weights=True).to_dict()
    read = AdaLoraConfig.from_dict({**values, "inference_mode": True, "target_modules": ["q_proj"]})
    assert read.init_r == 12


def test_r_has_no_effect_and_it_is_said(caplog):
    with caplog.at_level("WARNING", "deltaw"):
        AdaLoraConfig(r=16)
    assert "r=16 has no effect" in caplog.text


def test_the_rank_of_a_layer_is_what_its_mask_keeps():
    config = AdaLoraConfig(init_r=3, target_r=1, rank_pattern={"a.q_proj.lora_E": [True, False, True]})
    assert config.rank_for("a.q_proj") == 2
    assert config.rank_for("b.q_proj") == 3
