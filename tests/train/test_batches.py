"""The trainer's batches: padded, padding-free and packed are one training, whatever the micro-batches; the order is
that of (seed, epoch); and what cannot work is refused before the first step."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tinychat import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainerCallback

from deltaw import LoraConfig, SFTConfig, SFTTrainer
from deltaw.data import Collator, FlatCollator, PackedDataset, TokenDataset, render_all
from deltaw.data.order import epoch_order
from deltaw.errors import ConfigError, ModelError
from deltaw.train.batches import collator_for, training_rows

ROWS = [{"prompt": f"say {i} " * (1 + i % 4), "completion": f"{i}!" * (1 + i % 3)} for i in range(8)]
DEFAULTS: dict[str, Any] = {
    "max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    "max_length": 64, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant",
}  # fmt: skip


@functools.lru_cache
def tokens() -> TokenDataset:
    return TokenDataset.of(render_all(ROWS, tiny_tokenizer()))


class Watch(TrainerCallback):
    """The gradients of each optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class Spy:
    """A collator that remembers the examples of each batch by their first tokens."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seen = inner, []

    def __call__(self, features: Any) -> Any:
        self.seen.append([tuple(feature["input_ids"]) for feature in features])
        return self.inner(features)


def trainer_of(where: Path, model: Any = None, dataset: Any = None, **values: Any) -> SFTTrainer:
    more = {key: values.pop(key) for key in ("callbacks", "eval_dataset", "data_collator", "compute_metrics")
            if key in values}  # fmt: skip
    return SFTTrainer(
        model=model or tiny_model(),
        args=SFTConfig(output_dir=str(where), **{**DEFAULTS, **values}),
        train_dataset=tokens() if dataset is None else dataset,
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        processing_class=tiny_tokenizer(),
        **more,
    )


def one_step(where: Path, **values: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first optimizer step."""
    watch = Watch()
    trainer = trainer_of(where, callbacks=[watch], **values)
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return loss, watch.gradients[0]


def assert_close(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]], share: float) -> None:
    assert one[0] == pytest.approx(other[0], rel=share)
    assert one[1].keys() == other[1].keys()
    everything = torch.cat([gradient.flatten() for gradient in other[1].values()])
    differing = torch.cat([one[1][name].flatten() for name in other[1]]) - everything
    assert differing.norm() <= share * everything.norm()


@pytest.mark.parametrize("fast", [True, False])
def test_padded_padding_free_and_packed_have_the_same_loss_and_gradients(tmp_path: Path, fast: bool) -> None:
    padded = one_step(tmp_path, fast_loss=fast)
    assert_close(one_step(tmp_path, fast_loss=fast, padding_free=True), padded, 1e-6)
    rows = len(PackedDataset(tokens(), 64))
    assert rows < 8
    packed = one_step(tmp_path, fast_loss=fast, packing=True, per_device_train_batch_size=rows)
    assert_close(packed, padded, 1e-6)


@pytest.mark.parametrize(
    ("fast", "shape"),
    [(True, {}), (True, {"padding_free": True}), (True, {"packing": True, "max_length": 30}), (False, {}),
     (False, {"padding_free": True})],
)  # fmt: skip
def test_accumulation_equals_the_large_batch(tmp_path: Path, fast: bool, shape: dict[str, Any]) -> None:
    """Over examples, or packed rows, of uneven lengths with uneven shares of supervised tokens."""
    assert len({int(tokens().arrays(i)[1].sum()) for i in range(8)}) > 1  # or the mean of means would do as well
    whole = one_step(tmp_path, fast_loss=fast, **shape)
    for size, steps in ((4, 2), (2, 4), (1, 8)) if fast else ((2, 4),):
        parts = one_step(
            tmp_path, fast_loss=fast, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **shape
        )
        assert_close(parts, whole, 1e-6)


# --- order --------------------------------------------------------------------------------------------------------


def seen_by(where: Path, **values: Any) -> list[list[tuple[int, ...]]]:
    flat = values.get("padding_free") or values.get("packing")
    spy = Spy(FlatCollator() if flat else Collator(1))
    trainer_of(where, data_collator=spy, **{"max_steps": 8, "per_device_train_batch_size": 3, **values}).train()
    return spy.seen


@pytest.mark.parametrize("order", ["random", "sequential", "group_by_length"])
def test_the_order_is_that_of_seed_and_epoch(tmp_path: Path, order: str) -> None:
    seen = seen_by(tmp_path, train_sampling_strategy=order, seed=5)
    for epoch in (0, 1):
        index = epoch_order(8, order, 5, epoch, lengths=tokens().lengths, batch_size=3)  # type: ignore[arg-type]
        wanted = [tuple(tokens()[int(i)]["input_ids"]) for i in index]
        assert [ids for batch in seen[3 * epoch : 3 * epoch + 3] for ids in batch] == wanted
    again = seen_by(tmp_path, train_sampling_strategy=order, seed=6, data_seed=5, padding_free=True)
    assert again == seen  # neither the shape of batches nor the seed of the adapters moves it


def test_packed_rows_are_reordered_each_epoch_and_stay_what_they_are(tmp_path: Path) -> None:
    seen = seen_by(tmp_path, packing=True, max_length=30, per_device_train_batch_size=1, max_steps=24)
    rows = len(PackedDataset(tokens(), 30))
    first, second = ([batch[0] for batch in seen[i * rows : (i + 1) * rows]] for i in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("shape", [{}, {"padding_free": True}, {"packing": True, "max_length": 30}])
def test_resumed_in_the_middle_of_the_second_epoch(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Bitwise the uninterrupted run, and with workers too: the same batches and the same weights."""
    values = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 5,
              "optim": "adamw_torch", "learning_rate": 1e-2, **shape}  # fmt: skip
    straight = trainer_of(tmp_path / "a", **values)
    straight.train()
    wanted = {n: p for n, p in straight.model.named_parameters() if p.requires_grad}
    workers = trainer_of(tmp_path / "b", dataloader_num_workers=2, **values)
    workers.train()
    resumed = trainer_of(tmp_path / "c", **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    for other in (workers, resumed):
        found = dict(other.model.named_parameters())
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


# --- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"padding_free": True}, {"packing": True, "per_device_train_batch_size": 1}])
def test_tokens_seen_are_all_real_ones(tmp_path: Path, shape: dict[str, Any]) -> None:
    """pad = eos here: counting what is not the pad token would miss the end of each turn."""
    trainer = trainer_of(tmp_path, max_steps=-1, num_train_epochs=2, **shape)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 2 * tokens().tokens


def test_operations_are_counted_as_transformers_counts_them(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    inputs = Collator(1)([tokens()[0], tokens()[1]])
    assert trainer.floating_point_ops(inputs) == Trainer.floating_point_ops(trainer, inputs) > 0
    assert trainer.floating_point_ops({}) == 0


@pytest.mark.parametrize("shape", [{"padding_free": True}, {"packing": True}])
def test_evaluation_is_the_same_in_one_row(tmp_path: Path, shape: dict[str, Any]) -> None:
    results = [trainer_of(tmp_path, eval_dataset=tokens(), **values).evaluate() for values in ({}, shape)]
    for figure in ("eval_loss", "eval_mean_token_accuracy"):
        assert results[0][figure] == pytest.approx(results[1][figure], rel=1e-6)


def test_metrics_of_predictions_are_given_examples_apart(tmp_path: Path) -> None:
    shapes = []

    def metrics(predictions: Any) -> dict[str, float]:
        shapes.append(predictions.label_ids.shape)
        return {}

    trainer = trainer_of(tmp_path, eval_dataset=tokens(), padding_free=True, compute_metrics=metrics)
    trainer.evaluate()
    assert shapes == [(8, int(tokens().lengths.max()))]
    assert isinstance(trainer.data_collator, FlatCollator)


# --- what cannot work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{"padding_free": True}, {"packing": True}])
def test_a_model_that_mixes_examples_is_refused_before_the_first_step(tmp_path: Path, shape: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1, state_size=4))
    args = SFTConfig(output_dir=str(tmp_path), **{**DEFAULTS, **shape})
    with pytest.raises(ModelError, match=r"MambaForCausalLM .* cannot hold several examples in one row"):
        SFTTrainer(mamba, args, tokens(), processing_class=tiny_tokenizer(), peft_config=LoraConfig(
            target_modules=["in_proj"]))  # fmt: skip


def test_packing_needs_all_rows_and_a_length(tmp_path: Path) -> None:
    args = SFTConfig(output_dir=str(tmp_path), packing=True)
    with pytest.raises(ConfigError, match="a stream never has"):
        training_rows(iter([]), args)
    args.max_length = None
    with pytest.raises(ConfigError, match="say how many tokens"):
        training_rows(tokens(), args)
    args.max_length = 64
    packed = training_rows(tokens(), args)
    assert training_rows(packed, args) is packed  # once
    assert training_rows(None, args) is None
    plain = SFTConfig(output_dir=str(tmp_path))
    assert training_rows(tokens(), plain) is tokens()
    assert isinstance(collator_for(packed, plain, 0), FlatCollator)  # whoever packed them
    assert collator_for(tokens(), plain, 7) == Collator(7)
