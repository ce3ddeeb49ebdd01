"""The trainer: that it learns, stops, saves adapters only, accumulates exactly, resumes, and refuses early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tinychat import save_tiny, tiny_model, tiny_tokenizer

from deltaw import LoraConfig, PeftModel, SFTConfig, SFTTrainer, get_peft_model, load_model
from deltaw.errors import ConfigError, DataError, ModelError, TargetError

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"say {word}"}],
        "completion": [{"role": "assistant", "content": word}],
    }
    for word in ("apple", "bird", "cat", "dog", "egg", "fish", "goat", "hat")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def settings(where: Path, **values: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(where),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    return SFTConfig(**{**defaults, **values})


def lora(**values: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **values})


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def trained(folder: Any, where: Path, rows: Any = ROWS, config: LoraConfig | None = None, **values: Any) -> SFTTrainer:
    trainer = SFTTrainer(model=folder, args=settings(where, **values), train_dataset=rows, peft_config=config or lora())
    trainer.train()
    return trainer


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_it_learns_what_an_answer_is_and_to_stop(folder: str, tmp_path: Path) -> None:
    trainer = trained(
        folder, tmp_path, max_steps=150, learning_rate=5e-3, per_device_train_batch_size=8, config=lora(r=16)
    )
    assert losses(trainer)[-1] < 0.6 < losses(trainer)[0]
    tokenizer, model = tiny_tokenizer(), trainer.model.eval()
    for row in ROWS[:3]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
        ids = prompt["input_ids"] if hasattr(prompt, "keys") else prompt
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        answer = out[0, ids.shape[1] :].tolist()
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) in {r["completion"][0]["content"] for r in ROWS}


def test_only_adapters_are_saved_and_they_reload_bitwise(folder: str, tmp_path: Path) -> None:
    trainer = trained(folder, tmp_path)
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert "chat_template.jinja" in names
    assert not any(name.endswith((".bin", ".pt")) or name == "model.safetensors" for name in names)
    assert all("lora_" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(load_model(folder), tmp_path / "adapter")
    for name, value in adapters(trainer.model).items():
        assert torch.equal(value, dict(again.named_parameters())[name])


def test_only_adapters_moved(folder: str, tmp_path: Path) -> None:
    trainer = trained(folder, tmp_path)
    base = load_model(folder).state_dict()
    now = trainer.model.unload().state_dict()
    assert base.keys() == now.keys()
    assert all(torch.equal(base[key], now[key]) for key in base)


def test_fast_and_plain_loss_train_alike(folder: str, tmp_path: Path) -> None:
    fast, plain = (trained(folder, tmp_path, fast_loss=flag, max_steps=5) for flag in (True, False))
    assert fast.fast
    assert not plain.fast
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-4)


def test_accumulation_equals_the_large_batch(folder: str, tmp_path: Path) -> None:
    """Rows of very different lengths: averaging each micro-batch by itself would weigh their tokens wrongly. One plain
    step of SGD at rate 1: the weights move by the gradient."""
    rows = [{"prompt": "a", "completion": "b" * (1 + 9 * (i % 4))} for i in range(8)]
    results = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        trainer = trained(
            folder, tmp_path, rows, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
            optim="sgd", max_grad_norm=0.0, learning_rate=1.0, lr_scheduler_type="constant",
        )  # fmt: skip
        results.append(adapters(trainer.model))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "again"),
    [
        ({}, {}),
        ({"packing": True, "max_length": 64}, {"dataloader_num_workers": 2}),
        ({"padding_free": True}, {"dataloader_num_workers": 2}),
        ({"train_sampling_strategy": "group_by_length"}, {"dataloader_num_workers": 2}),
    ],
    ids=["padded", "packing", "padding_free", "group_by_length"],
)
def test_one_seed_is_one_run(folder: str, tmp_path: Path, values: dict[str, Any], again: dict[str, Any]) -> None:
    """To the bit, with dropout, and however many workers make the batches."""
    values = {"per_device_train_batch_size": 1, "max_steps": 5, **values}
    first, second = (
        trained(folder, tmp_path, seed=5, config=lora(lora_dropout=0.3), **values, **more) for more in ({}, again)
    )
    assert losses(first) == losses(second)
    other = trained(folder, tmp_path, seed=6, **values)
    a, b, c = (adapters(t.model) for t in (first, second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_resuming_gives_the_uninterrupted_weights(folder: str, tmp_path: Path) -> None:
    straight = trained(folder, tmp_path / "a", max_steps=6)
    trained(folder, tmp_path / "b", max_steps=6, save_strategy="steps", save_steps=3)
    again = SFTTrainer(model=folder, args=settings(tmp_path / "b", max_steps=6), train_dataset=ROWS, peft_config=lora())
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    a, b = adapters(straight.model), adapters(again.model)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_model_comes_back(folder: str, tmp_path: Path) -> None:
    args = settings(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=folder, args=args, train_dataset=ROWS, eval_dataset=ROWS, peft_config=lora())
    trainer.train()
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evals[0] == max(evals) > evals[-1]  # the loss falls, and the largest is what was asked for
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evals[0], rel=1e-5)
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(torch.tensor(evals[0]).exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    "values", [{"gradient_checkpointing": True}, {"bf16": True}, {"train_sampling_strategy": "group_by_length"}]
)
def test_common_switches(folder: str, tmp_path: Path, values: dict[str, Any]) -> None:
    trainer = trained(folder, tmp_path, max_steps=4, learning_rate=2e-2, **values)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_bf16_over_a_bfloat16_base_leaves_autocast_off(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    trainer = SFTTrainer(
        model=model,
        args=settings(tmp_path, bf16=True),
        train_dataset=ROWS,
        peft_config=lora(),
        processing_class=tiny_tokenizer(),
    )
    assert trainer.accelerator.mixed_precision == "no"
    trainer.train()
    assert {p.dtype for n, p in trainer.model.named_parameters() if "lora_" in n} == {torch.float32}


def test_max_seq_length_is_taken_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "deltaw"):
        assert settings(tmp_path, max_seq_length=77).max_length == 77
    assert "max_length" in caplog.text


def test_bad_rows_are_refused_before_the_model_is_even_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompt"):
        SFTTrainer(
            model="no/such-model", args=settings(tmp_path), train_dataset=[{"question": "x"}],
            peft_config=lora(), processing_class=tiny_tokenizer(),
        )  # fmt: skip


def test_mistakes_name_their_cure(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="peft_config=LoraConfig"):
        SFTTrainer(
            model=tiny_model().requires_grad_(False),
            args=settings(tmp_path),
            train_dataset=ROWS,
            processing_class=tiny_tokenizer(),
        )
    with pytest.raises(TargetError, match="q_proj"):
        SFTTrainer(
            model=folder, args=settings(tmp_path), train_dataset=ROWS, peft_config=lora(target_modules=["q_prj"])
        )
    with pytest.raises(ConfigError, match="padding_free"):
        settings(tmp_path, packing=True, padding_free=True)
    with pytest.raises(ConfigError, match="SFTConfig"):
        SFTTrainer(model=folder, args={"output_dir": "x"}, train_dataset=ROWS, peft_config=lora())  # type: ignore[arg-type]


def test_a_wrapped_model_can_be_passed(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), lora())
    trainer = SFTTrainer(model=model, args=settings(tmp_path), train_dataset=ROWS, processing_class=tiny_tokenizer())
    trainer.train()
    assert trainer.model is model


def test_full_fine_tuning_works_too(tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=tiny_model(),
        args=settings(tmp_path, learning_rate=1e-3),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import importlib.util, transformers.utils.import_utils as utils
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "peft" else find(name, *a)
sys.path[:0] = sys.argv[3].split(":")
from pathlib import Path
import test_trainer as t
args = t.settings(Path(sys.argv[2]), max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps",
                  save_steps=1, load_best_model_at_end=True)
trainer = t.SFTTrainer(model=sys.argv[1], args=args, train_dataset=t.ROWS, eval_dataset=t.ROWS, peft_config=t.lora())
trainer.train()
assert not utils.is_peft_available()
print("eval", trainer.evaluate()["eval_loss"])
"""


def test_without_peft_installed(folder: str, tmp_path: Path) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEFT, folder, str(tmp_path), f"{here}:{here.parent}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert "eval" in done.stdout
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
