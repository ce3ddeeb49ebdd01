"""A run from its description to a verified adapter, on a tiny random model."""

from __future__ import annotations

import json

import pytest
import torch
from tinychat import save_tiny, write_rows

from deltaw import NF4Config, NF4Linear, PeftModel, SFTConfig
from deltaw.adapters import CONFIGS
from deltaw.config import RunConfig, load_run_config
from deltaw.data import load_rows, render_all
from deltaw.errors import CheckpointError, ConfigError, DataError
from deltaw.loading import load_model, load_tokenizer
from deltaw.pipeline import check_run, load_base, run_training, verify_saved

# Keys that the pipeline itself reads; every other one must reach SFTConfig or a method's config.
OWN_KEYS = {
    "model_name_or_path", "dtype", "attn_implementation", "trust_remote_code", "load_in_4bit",
    "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
    "dataset_name", "dataset_train_split", "dataset_test_split", "eval_dataset_name", "val_size",
    "max_train_samples", "max_eval_samples", "chat_template_path", "overlong", "allow", "method", "preset",
    "overwrite_output_dir", "dataset_streaming", "dataset_weights", "val_group_column",
}  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def describe(base, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")

    def config(**keys) -> RunConfig:
        return RunConfig(
            **{
                "model_name_or_path": str(base), "dataset_name": str(rows), "use_cpu": True,
                "output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 4,
                "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1, "r": 4,
                "lora_dropout": 0.0, **keys,
            }
        )  # fmt: skip

    return config


def test_no_key_is_read_by_nothing():
    read = OWN_KEYS.union(SFTConfig.__dataclass_fields__, *(c.__dataclass_fields__ for c in CONFIGS.values()))
    assert set(RunConfig.model_fields) <= read


def test_a_run_leaves_a_proven_adapter(describe, base, tmp_path):
    events: list[str] = []
    config = describe(val_size=0.2)
    done = run_training(config, on_event=events.append, quiet=True)

    out = tmp_path / "out"
    for name in (
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "run.yaml", "trainer_state.json", "all_results.json",
    ):  # fmt: skip
        assert (out / name).is_file(), name
    assert not list(out.glob("*.part"))
    assert load_run_config(out / "run.yaml").model_dump() == config.model_dump()

    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == config.model_name_or_path
    results = json.loads((out / "all_results.json").read_text())
    assert results["train_loss"] > 0
    assert results["eval_loss"] > 0
    assert results["train_runtime"] > 0
    assert results["train_tokens"] > 3 * 4 * 20  # three steps of four examples of more than twenty tokens
    assert results["data"]["examples"] == 16
    assert results["data"]["eval_examples"] == 4
    for key in ("base_fingerprint", "dataset_fingerprint", "template_fingerprint"):
        assert len(results[key]) == 64
    assert results["versions"]["torch"] == torch.__version__

    assert done.parity.trained == 0  # float32 on a CPU: bit for bit
    assert done.parity.base > 0
    assert any("16 rows" in event for event in events)

    # an outsider who knows nothing of the run gets the same model
    fresh = PeftModel.from_pretrained(load_model(base), str(out))
    ids = torch.tensor([load_tokenizer(str(out))("hello")["input_ids"]])
    with torch.no_grad():
        with_adapter = fresh(input_ids=ids).logits
        with fresh.disable_adapter():
            without = fresh(input_ids=ids).logits
    assert not torch.equal(with_adapter, without)


def test_a_seed_makes_the_same_adapter_again(describe, tmp_path):
    def weights(name: str, seed: int) -> bytes:
        run_training(describe(output_dir=str(tmp_path / name), seed=seed, lora_dropout=0.1), quiet=True)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    first = weights("a", 1)
    assert weights("b", 1) == first
    assert weights("c", 2) != first


@pytest.mark.parametrize("keys", [{}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}])
def test_a_run_in_4_bits_is_proven_on_the_same_4_bits(describe, base, keys):
    config = describe(load_in_4bit=True, bias="all" if keys else "none", **keys)
    events: list[str] = []
    done = run_training(config, on_event=events.append, quiet=True)
    assert done.parity.trained == 0
    assert done.parity.base > 0
    # weights in 4 bits are counted as what they stand for
    assert (
        done.results["all_params"]
        == sum(p.numel() for p in load_model(base).parameters()) + (done.results["trainable_params"])
    )
    again = load_run_config(done.output_dir / "run.yaml")
    assert again.quantization == {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | keys
    layer = load_base(again).model.layers[0].self_attn.q_proj
    assert isinstance(layer, NF4Linear)
    assert layer.quant_type == again.bnb_4bit_quant_type
    assert (layer.nested_absmax is not None) == again.bnb_4bit_use_double_quant


def test_a_run_over_a_folder_of_4_bits(describe, base, tmp_path):
    load_model(base, quantization_config=NF4Config()).save_pretrained(tmp_path / "packed")
    load_tokenizer(str(base)).save_pretrained(tmp_path / "packed")
    done = run_training(describe(model_name_or_path=str(tmp_path / "packed")), quiet=True)
    assert done.parity.trained == 0


def test_trained_biases_are_verified_on_a_fresh_base(describe):
    assert run_training(describe(bias="all"), quiet=True).parity.trained == 0


def test_the_data_is_checked_before_any_weight_is_loaded(describe, base, tmp_path, monkeypatch):
    import deltaw.pipeline as pipeline

    def no_model(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(pipeline, "load_model", no_model)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"nonsense": 1}\n')
    with pytest.raises(DataError):
        run_training(describe(dataset_name=str(bad)), quiet=True)
    with pytest.raises(DataError):
        run_training(describe(max_length=10), quiet=True)
    assert check_run(describe())["examples"] == 20
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_written_over(describe, tmp_path):
    out = tmp_path / "out"
    run_training(describe(save_steps=2), quiet=True)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds an adapter of an earlier run"):
        run_training(describe(), quiet=True)
    (out / "notes.txt").write_text("mine")
    run_training(describe(overwrite_output_dir=True, seed=1), quiet=True)
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "checkpoint-2").exists()


def test_resuming_goes_on(describe, tmp_path):
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        run_training(describe(resume_from_checkpoint=True), quiet=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        run_training(describe(resume_from_checkpoint=str(tmp_path / "gone")), quiet=True)
    run_training(describe(save_steps=2, lr_scheduler_type="constant"), quiet=True)
    (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="checkpoints of an earlier run"):
        run_training(describe(), quiet=True)
    run_training(
        describe(save_steps=2, max_steps=5, lr_scheduler_type="constant", resume_from_checkpoint=True),
        quiet=True,
    )
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 5


def test_a_run_that_learns_nothing_is_an_error(describe, base, tmp_path):
    config = describe()
    run_training(config, quiet=True)
    tokenizer = load_tokenizer(str(base))
    rendered = render_all(load_rows(config.dataset_name), tokenizer)
    model = PeftModel.from_pretrained(load_model(base), config.output_dir, is_trainable=True)
    assert verify_saved(model, config.output_dir, rendered).trained == 0
    assert list(model.peft_config) == ["default"]
    assert any(parameter.requires_grad for parameter in model.parameters())

    untrained = tmp_path / "untrained"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    model.save_pretrained(untrained)
    with pytest.raises(CheckpointError, match="changes nothing"):
        verify_saved(model, untrained, rendered)
    with pytest.raises(CheckpointError, match="not the one that was trained"):
        verify_saved(model, config.output_dir, rendered)
