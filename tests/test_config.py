"""One run described: coercion, presets, every fault at once, and a resolved file that can be run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import yaml
from pydantic import ValidationError

from deltaw.adapterfields import belongs
from deltaw.config import ALIASES, GROUPS, RunConfig, group_of, keys_of, load_run_config
from deltaw.errors import ConfigError
from deltaw.presets import PRESETS

NEEDED = {"model_name_or_path": "base", "dataset_name": "rows.jsonl"}


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(f"model_name_or_path: base\ndataset_name: rows.jsonl\n{text}", encoding="utf-8")
    return path


def test_needs_neither_torch_nor_transformers():
    code = "import sys, deltaw.config; print({'torch', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_yaml_floats_and_bare_no_are_read_by_the_fields_type(tmp_path):
    config = load_run_config(
        write(tmp_path, "learning_rate: 1e-4\neval_strategy: no\nsave_strategy: no\nmax_steps: 1e2\n")
    )
    assert config.learning_rate == 1e-4
    assert (config.eval_strategy, config.save_strategy, config.max_steps) == ("no", "no", 100)


def test_overrides_win_over_the_file_and_none_is_not_given(tmp_path):
    config = load_run_config(write(tmp_path, "r: 4\nseed: 7\n"), {"r": "32", "seed": None, "lora-alpha": "64"})
    assert (config.r, config.seed, config.lora_alpha) == (32, 7, 64)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_what_is_not_given(name):
    assert RunConfig(**NEEDED, preset=name).pick(PRESETS[name]) == PRESETS[name]
    assert RunConfig(**NEEDED, preset=name, r=3).pick(PRESETS[name]) == {**PRESETS[name], "r": 3}


def test_the_presets_are_the_ones_of_the_text():
    assert [PRESETS[name]["r"] for name in ("standard", "memory_efficient", "high_performance")] == [
        16,
        8,
        64,
    ]
    assert PRESETS["high_performance"]["use_rslora"] is True


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),  # a plain name is never a regular expression
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        (["q_proj"], ["q_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_target_modules_from_a_shell_or_a_file(given, read):
    assert RunConfig(**NEEDED, target_modules=given).target_modules == read


def test_other_texts_of_a_shell():
    config = RunConfig(
        **NEEDED,
        rank_pattern="{q_proj: 4}",
        layers_to_transform="0,1",
        dtype="torch.bfloat16",
        completion_only_loss="true",
        resume_from_checkpoint="true",
        report_to="tensorboard,wandb",
    )
    assert config.rank_pattern == {"q_proj": 4}
    assert config.layers_to_transform == [0, 1]
    assert config.dtype == "bfloat16"
    assert config.completion_only_loss is True
    assert config.resume_from_checkpoint is True
    assert config.report_to == ["tensorboard", "wandb"]
    assert RunConfig(**NEEDED, layers_to_transform=2, dtype="fp32").layers_to_transform == [2]


def test_all_faults_are_told_at_once_with_place_key_value_why_and_cure(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rat: 1e-4\nr: 0\nbias: some\nbnb_4bit_quant_type: FP4\nload_best_model_at_end: true\n")
    with pytest.raises(ConfigError) as raised:
        load_run_config(path, {"lora_dropout": "1.5", "nonsense": "1"})
    told = str(raised.value)
    for part in (
        f"{path}:1: learning_rat = '1e-4': unknown key; did you mean 'learning_rate'",
        f"{path}:2: r = 0:",
        f"{path}:3: bias = 'some': it should be 'none', 'all' or 'lora_only'",
        f"{path}:4: bnb_4bit_quant_type = 'fp4': nothing reads it while load_in_4bit is false",
        f"{path}:5: load_best_model_at_end = True: there are no rows to evaluate on",
        "command line: lora_dropout = '1.5': it should be less than 1",
        "command line: nonsense = '1': unknown key (deltaw train --help lists all keys)",
        "model_name_or_path: missing",
        "dataset_name: missing",
    ):
        assert part in told


def test_a_single_fault_is_one_line():
    with pytest.raises(ConfigError) as raised:
        load_run_config(None, {**NEEDED, "r": "many"})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("r: 4\nr: 8\n", "r: given on line 3 and again on line 4"),
        ("rank_pattern:\n  q: 1\n  q: 2\n", "q: given on line 4 and again on line 5"),
        ("r: [1\n", "not valid YAML"),
        ("max_length: 10\nmax_seq_length: 20\n", "'max_length' says the same"),
    ],
)
def test_broken_files(tmp_path, text, told):
    with pytest.raises(ConfigError, match=r"run\.yaml") as raised:
        load_run_config(write(tmp_path, text))
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"- a\n- b\n", "no 'key: value' lines"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"", "missing"),
        (b"a: *b\n", "not valid YAML"),
    ],
)
def test_files_that_describe_no_run(tmp_path, content, told):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load_run_config(tmp_path / "run.yaml")


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no such file; .* has run\.yaml"):
        load_run_config(tmp_path / "rnu.yaml")


def test_old_names_are_read_and_noted():
    config = load_run_config(None, {**NEEDED, "max_seq_length": "64", "torch_dtype": "float32"})
    assert (config.max_length, config.dtype) == (64, "float32")
    assert [note for note in config.notes if "called max_length today" in note]
    assert set(ALIASES.values()) <= set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"packing": True, "padding_free": True}, "padding_free"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"max_steps": 0}, "max_steps"),
        ({"eval_strategy": "steps"}, "eval_strategy"),
        ({"val_size": 0.1, "eval_dataset_name": "b"}, "val_size"),
        ({"val_size": 0.1, "eval_steps": 5}, "eval_steps"),
        ({"save_strategy": "no", "save_steps": 5}, "save_steps"),
        (
            {"val_size": 0.1, "eval_strategy": "epoch", "load_best_model_at_end": True},
            "load_best_model_at_end",
        ),
        (
            {
                "val_size": 0.1,
                "eval_strategy": "steps",
                "eval_steps": 3,
                "save_steps": 4,
                "load_best_model_at_end": True,
            },
            "save_steps",
        ),
        ({"save_strategy": "best"}, "save_strategy"),
    ],
)
def test_keys_that_cannot_work_together(given, key):
    with pytest.raises(ConfigError, match=f"command line: {key} = "):
        load_run_config(None, NEEDED | given)
    with pytest.raises(ValidationError):
        RunConfig(**NEEDED, **given)


def test_evaluating_and_saving_alike_is_fine():
    config = RunConfig(
        **NEEDED, val_size=0.1, eval_strategy="steps", eval_steps=2, save_steps=4, load_best_model_at_end=True
    )
    assert config.evaluates


def test_a_resolved_file_is_the_same_run(tmp_path):
    config = load_run_config(
        None,
        NEEDED
        | {
            "preset": "memory_efficient",
            "r": "4",
            "learning_rate": "1e-5",
            "rank_pattern": "{q: 2}",
            "run_name": "é: x",
        },
    )
    text = config.to_yaml()
    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
    assert load_run_config(tmp_path / "again.yaml").model_dump() == config.model_dump()
    told = [group for group in GROUPS if any(belongs(key, "lora") for key in keys_of(group))]
    assert [line[2:] for line in text.splitlines() if line.startswith("# ")] == told
    assert set(yaml.safe_load(text)) == {key for key in RunConfig.model_fields if belongs(key, "lora")}
    assert "target_modules: [q_proj, v_proj]\n" in text


def test_every_key_has_a_doc_a_group_and_a_place_in_the_schema():
    schema = RunConfig.model_json_schema()["properties"]
    for key, field in RunConfig.model_fields.items():
        assert field.description, key
        assert group_of(key) in GROUPS
        assert schema[key]["group"] == group_of(key)


def test_a_run_is_immutable():
    with pytest.raises(ValidationError):
        RunConfig(**NEEDED).r = 3


def test_max_steps_beside_epochs_is_noted():
    notes = load_run_config(None, {**NEEDED, "max_steps": 5, "num_train_epochs": 2}).notes
    assert any("max_steps = 5 decides" in note for note in notes)


@pytest.mark.parametrize("value", [".inf", ".nan", "1e999", "[1]", "{a: x}", "2020-01-01", "!!binary aGk=", "x" * 5000])
@pytest.mark.parametrize("key", ["learning_rate", "r", "eval_strategy", "rank_pattern", "val_size", "preset"])
def test_strange_values_give_one_readable_error(tmp_path, key, value):
    with pytest.raises(ConfigError) as raised:
        load_run_config(write(tmp_path, f"{key}: {value}\n"))
    assert f"{key} = " in str(raised.value)
    assert len(str(raised.value)) < 2000


def test_any_bytes_give_a_run_or_one_error(tmp_path):
    random = Random(0)
    path = tmp_path / "run.yaml"
    words = [
        b"r",
        b": ",
        b"\n",
        b"- ",
        b"{",
        b"[",
        b"]",
        b"&a ",
        b"*a",
        b"!!map ",
        b"<<",
        b"? ",
        b"null",
        b"1",
        b"'",
        b"  ",
    ]
    for _ in range(300):
        path.write_bytes(b"".join(random.choices(words, k=random.randint(0, 12))))
        with pytest.raises(ConfigError):
            load_run_config(path)
