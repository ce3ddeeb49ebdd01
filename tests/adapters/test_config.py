"""LoraConfig and its file."""

import copy
import dataclasses
import json
import logging
import pickle

import hypothesis.strategies as st
import peft
import pytest
from hypothesis import given, settings

from deltaw import LoraConfig, PeftConfig, TaskType
from deltaw.errors import CheckpointError, ConfigError

#: a value away from the default for each setting of PEFT's that is not supported
AWAY = {
    "alora_invocation_tokens": [1, 2],
    "ensure_weight_tying": True,
    "layer_replication": [[0, 2]],
    "loftq_config": {"loftq_bits": 4},
    "target_parameters": ["experts.weight"],
    "trainable_token_indices": [3],
    "use_qalora": True,
}


def test_fields_and_defaults_are_peft_s():
    theirs = peft.LoraConfig().to_dict()
    ours = LoraConfig().to_dict()
    assert set(ours) | {"runtime_config"} == set(theirs) | {"runtime_config"}
    differs = {k for k in ours if ours[k] != getattr(theirs.get(k), "value", theirs.get(k))}
    assert differs <= {"peft_version", "runtime_config"}  # neither is a setting of the method


@pytest.mark.parametrize("field", LoraConfig.unsupported)
def test_each_unsupported_field_is_refused_by_name(field):
    assert field in {f.name for f in dataclasses.fields(peft.LoraConfig)}
    with pytest.raises(ConfigError, match=rf"{field}=.*does not support; leave it at its default"):
        LoraConfig(**{field: AWAY.get(field, {"any": "thing"})})
    if field != "runtime_config":  # never in a file
        LoraConfig.from_dict({"peft_type": "LORA", field: peft.LoraConfig().to_dict()[field]})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r=0: the rank must be a positive integer"),
        ({"r": -3}, "r=-3"),
        ({"r": 8.0}, "r=8.0: int is needed"),
        ({"r": True}, "r=True"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0: a probability in \[0, 1\)"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_dropout": "low"}, "lora_dropout='low': float is needed"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"bias": "some"}, "bias='some': use 'none', 'all' or 'lora_only'"),
        ({"use_rslora": "false"}, "use_rslora='false': bool is needed"),
        ({"task_type": "CAUSAL"}, "task_type='CAUSAL'.*did you mean 'CAUSAL_LM'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": "big"}}, "alpha_pattern="),
        ({"alpha_pattern": {"q_(proj": 2}}, r"alpha_pattern: 'q_\(proj' is not a regular expression"),
        ({"target_modules": "q_(proj"}, "target_modules: .* is not a regular expression"),
        ({"target_modules": 3}, "target_modules=3"),
        ({"target_modules": [["q_proj"]]}, "target_modules="),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head'"),
        ({"init_lora_weights": "gausian"}, "init_lora_weights='gausian'.*did you mean 'gaussian'"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights='pissa_niter_x'"),
        ({"layers_pattern": "h"}, "layers_pattern is set but layers_to_transform is not"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "needs target_modules as a list"),
    ],
)
def test_impossible_values_are_refused_with_a_cure(fields, words):
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**fields)


def test_all_faults_are_in_one_error():
    with pytest.raises(ConfigError) as error:
        LoraConfig(r=0, lora_dropout=2.0, bias="x", use_qalora=True)
    assert all(f"  - {name}" in str(error.value) for name in ("r=0", "lora_dropout=2.0", "bias='x'", "use_qalora=True"))


@pytest.mark.parametrize("given", [["v", "q"], ("v", "q"), {"q", "v"}])
def test_lists_of_names_are_kept_as_sets_and_written_sorted(given):
    config = LoraConfig(target_modules=given, exclude_modules=given, layers_to_transform=range(2))
    assert config.target_modules == config.exclude_modules == {"q", "v"}
    assert config.to_dict()["target_modules"] == config.to_dict()["exclude_modules"] == ["q", "v"]
    assert config.layers_to_transform == [0, 1]


def test_rank_and_alpha_for_a_layer():
    config = LoraConfig(r=8, lora_alpha=16, rank_pattern={"q_proj": 4}, alpha_pattern={r"layers\.1\..*": 3})
    assert [config.rank_for(f"layers.1.{n}") for n in ("q_proj", "v_proj")] == [4, 8]
    assert [config.alpha_for(f"layers.{i}.q_proj") for i in (0, 1)] == [16, 3]


def test_file_round_trip_and_peft_s_keys(tmp_path):
    config = LoraConfig(
        r=4,
        target_modules=["v_proj", "q_proj"],
        task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 2},
        use_rslora=True,
    )
    config.save_pretrained(tmp_path / "ours")
    text = (tmp_path / "ours" / "adapter_config.json").read_text()  # indent 2, sorted, as PEFT writes it
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert PeftConfig.from_pretrained(tmp_path / "ours") == config
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["adapter_config.json"]

    theirs = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert (theirs.r, theirs.target_modules, theirs.rank_pattern) == (4, {"q_proj", "v_proj"}, {"q_proj": 2})
    theirs.save_pretrained(tmp_path / "theirs")
    assert set(json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())) == set(json.loads(text))
    back = PeftConfig.from_pretrained(tmp_path / "theirs")
    assert dataclasses.replace(back, peft_version=None, inference_mode=False) == config


def test_an_unknown_field_is_refused_with_a_value_and_reported_without(tmp_path, caplog):
    LoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "use_new_thing": False, "new_list": []}))
    with caplog.at_level(logging.WARNING, "deltaw"):
        PeftConfig.from_pretrained(tmp_path)
    assert "use_new_thing=False" in caplog.text
    assert "new_list=[]" in caplog.text
    path.write_text(json.dumps({**values, "use_new_thing": True, "lora_alhpa": 3, "r": 0}))
    with pytest.raises(ConfigError) as error:
        PeftConfig.from_pretrained(tmp_path)
    text = str(error.value)
    assert "use_new_thing=True" in text
    assert "did you mean 'lora_alpha'" in text
    assert "r=0" in text
    assert str(path) in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(LoraConfig().to_dict())), JSON, min_size=1, max_size=3))
def test_any_value_of_any_field_is_taken_or_refused_by_name(values):
    """A fuzzed file gives a config or one clear error, never another exception."""
    try:
        config = LoraConfig.from_dict(values)
    except ConfigError as error:
        assert any(key in str(error) for key in values)  # noqa: PT017
    else:
        json.dumps(config.to_dict())
        assert copy.deepcopy(config) == config or "nan" in str(config).lower()


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ("{", CheckpointError, "not valid JSON"),
        ("[]", CheckpointError, "no 'peft_type'"),
        ('{"model_type": "llama"}', CheckpointError, "does not describe an adapter"),
        ('{"peft_type": "LORAX"}', ConfigError, "'LORAX' is not a method of deltaw.*did you mean 'LORA'"),
        ("\xff", CheckpointError, "not valid JSON"),
    ],
)
def test_damaged_config_files(tmp_path, content, kind, words):
    (tmp_path / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(kind, match=words):
        PeftConfig.from_pretrained(tmp_path)


def test_a_missing_config_names_what_is_there(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json; it holds model.safetensors"):
        PeftConfig.from_pretrained(tmp_path)


def test_from_pretrained_sets_and_checks_fields(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path, inference_mode=True).inference_mode
    with pytest.raises(ConfigError, match="'ranks' is not a field"):
        LoraConfig.from_pretrained(tmp_path, ranks=3)
    with pytest.raises(ConfigError, match="r=0"):
        LoraConfig.from_pretrained(tmp_path, r=0)


def test_task_type_is_an_enum_that_equals_its_name():
    config = LoraConfig(task_type="CAUSAL_LM")
    assert config.task_type is TaskType.CAUSAL_LM
    assert config.task_type == "CAUSAL_LM"
    assert str(config.peft_type) == "LORA"


def test_copies_and_pickles():
    config = LoraConfig(r=4, target_modules=["q"], task_type="CAUSAL_LM", rank_pattern={"q": 2})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
