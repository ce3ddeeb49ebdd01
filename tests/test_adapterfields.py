"""The adapter's part of a run: each method's own keys, whose a key is, and what presets mean to it."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import yaml

import deltaw
from deltaw.adapterfields import AdapterFields, belongs, methods_of, preset_for
from deltaw.adapters.methods.init import known_initialiser
from deltaw.config import RunConfig, load_run_config
from deltaw.errors import ConfigError
from deltaw.fieldtypes import Init
from deltaw.methods import METHODS
from deltaw.pipeline import adapter_config
from deltaw.presets import PRESETS

NEEDED = {"model_name_or_path": "base", "dataset_name": "rows.jsonl"}
#: fields of the configs that a run does not offer: what they are for has no place in it
NOT_OFFERED = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "megatron_core", "qalora_group_size",  # nothing reads them
    "layers_pattern",  # for models whose list of layers has an uncommon name
    "total_step",  # follows from the run
    "trainable_token_indices", "ensure_weight_tying",  # a run changes no vocabulary
}  # fmt: skip


def fields_of(name: str) -> dict[str, dataclasses.Field]:
    kind = getattr(deltaw, METHODS[name].config)
    return {f.name: f for f in dataclasses.fields(kind) if f.init and f.name not in kind.unsupported}


def test_the_choices_are_the_catalogue_s():
    annotation = AdapterFields.model_fields["method"].annotation
    assert typing.get_args(annotation) == tuple(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_keys_are_fields_of_its_config_and_all_of_them_are_offered(name):
    own = {key for key in AdapterFields.model_fields if belongs(key, name)} - {"method", "preset"}
    assert own <= fields_of(name).keys()
    if name != "adalora":  # there they are of no use, or mean what was pruned
        assert fields_of(name).keys() - NOT_OFFERED - own == set()
    else:
        unread = {
            "r",
            "use_rslora",
            "use_dora",
            "init_lora_weights",
            "lora_bias",
            "rank_pattern",
            "alpha_pattern",
            "loftq_config",
        }
        assert fields_of(name).keys() - NOT_OFFERED - own <= unread


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_means_the_same_to_every_method(name, preset):
    run = RunConfig(**NEEDED, method=name, preset=preset)
    config, values = adapter_config(run, steps=100), PRESETS[preset]
    assert config.target_modules in (values["target_modules"], set(values["target_modules"]))
    rank = config.target_r if name == "adalora" else config.r
    alpha = config.alpha if name in ("loha", "lokr") else config.lora_alpha
    assert (rank, alpha) == (values["r"], values["lora_alpha"])
    if hasattr(config, "lora_dropout"):
        assert config.lora_dropout == values["lora_dropout"]
    for key, value in METHODS[name].fixes.items():
        assert getattr(config, key) == value
    assert preset_for(preset, name).keys() <= {key for key in AdapterFields.model_fields if belongs(key, name)}


def test_adalora_s_schedule_is_given_in_steps_or_shares():
    run = RunConfig(**NEEDED, method="adalora", preset="memory_efficient", tinit=5)
    config = adapter_config(run, steps=200)
    assert (config.tinit, config.tfinal, config.total_step) == (5, 60, 200)
    assert (config.init_r, config.target_r) == (12, 8)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"target_r": 4}, "target_r = 4: a key of adalora, and method is 'lora' (lora has r)"),
        ({"method": "adalora", "r": 16}, "r = 16: a key of lora, rslora, dora, pissa, olora, loha and lokr"),
        ({"method": "adalora", "r": 16}, "(adalora has init_r and target_r)"),
        ({"method": "loha", "lora_alpha": 32}, "and method is 'loha' (loha has alpha)"),
        ({"method": "loha", "decompose_both": True}, "decompose_both = True: a key of lokr"),
        ({"method": "loha", "init_weights": "lycoris"}, "LoHa has no such start, LoKr has"),
        ({"method": "dora", "use_dora": False}, "use_dora = False: DoRA is use_dora: true"),
        ({"method": "olora", "init_lora_weights": "pissa"}, "OLoRA is init_lora_weights: olora"),
        ({"method": "DoRa", "alpha": 1}, "alpha = 1: a key of loha and lokr, and method is 'dora'"),
        ({"method": "adalor"}, "method = 'adalor': it should be"),
        ({"method": "adalor"}, "did you mean 'adalora'"),
        ({"init_lora_weights": "pisa"}, "init_lora_weights = 'pisa'"),
    ],
)  # fmt: skip
def test_a_key_of_another_method_is_a_fault_that_says_whose_it_is(given, told):
    with pytest.raises(ConfigError) as raised:
        load_run_config(None, NEEDED | given)
    assert told in str(raised.value)


def test_all_is_told_at_once_and_a_wrong_method_accuses_no_key():
    with pytest.raises(ConfigError) as raised:
        load_run_config(None, NEEDED | {"target_r": "4", "alpha": 8, "max_steps": 0, "seed": -1})
    for key in ("target_r", "alpha", "max_steps", "seed"):
        assert f"command line: {key} = " in str(raised.value)
    with pytest.raises(ConfigError) as raised:
        load_run_config(None, NEEDED | {"method": "adalroa", "target_r": 4, "seed": -1})
    assert "target_r" not in str(raised.value)
    assert "seed = -1" in str(raised.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_resolved_file_is_the_same_run_and_holds_no_key_of_another_method(name, tmp_path):
    run = RunConfig(**NEEDED, method=name, preset="high_performance")
    path = tmp_path / "run.yaml"
    path.write_text(run.to_yaml(), encoding="utf-8")
    again = load_run_config(path)
    assert again.model_dump() == run.model_dump()
    assert adapter_config(again, 50).to_dict() == adapter_config(run, 50).to_dict()
    held = set(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert held == {key for key in RunConfig.model_fields if belongs(key, name)}
    assert all((getattr(run, key) is None) for key in AdapterFields.model_fields if not belongs(key, name))
    assert RunConfig(**run.model_dump()).model_dump() == run.model_dump()


def test_null_is_not_given():
    run = load_run_config(
        None,
        NEEDED,
    )
    assert RunConfig(**NEEDED, r=None, target_r=None).model_dump() == run.model_dump()


def test_every_start_of_a_run_is_known_to_lora():
    words = [word for part in typing.get_args(Init) for word in typing.get_args(part) if isinstance(word, str)]
    assert "orthogonal" in words
    assert all(known_initialiser(word) for word in [*words, "pissa_niter_4"])


def test_methods_of():
    assert methods_of("target_modules") == methods_of("learning_rate") == ()
    assert methods_of("decompose_both") == ("lokr",)
    assert belongs("learning_rate", "dora")
