"""Training on rows that are read meanwhile: the same bits for any number of workers, and after going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tinychat import tiny_model, tiny_tokenizer

from deltaw import LoraConfig, SFTConfig, SFTTrainer
from deltaw.data import StreamedExamples, StreamedRows
from deltaw.errors import DataError

#: 13 rows in steps of 4: every pass ends within a step
ROWS = [{"prompt": f"say {i}", "completion": "b" * (1 + 7 * (i % 4))} for i in range(13)]

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def trained(rows: Any, where: Path, resume: str | None = None, **values: Any) -> tuple[list[Any], dict[str, Any]]:
    wanted: dict[str, Any] = {
        "output_dir": str(where), "max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "no",
        "gradient_accumulation_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True,
    }  # fmt: skip
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=tiny_model(), args=SFTConfig(**{**wanted, **values}), train_dataset=rows, peft_config=config,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return losses, weights


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("values", [{}, {"padding_free": True}], ids=["padded", "padding-free"])
def test_the_same_bits_for_any_number_of_workers_and_after_going_on(file, tmp_path, values):
    whole = trained(StreamedRows(file), tmp_path / "a", save_strategy="steps", save_steps=5, **values)
    assert len(whole[0]) == 8
    helped = trained(StreamedRows(file), tmp_path / "b", dataloader_num_workers=2, **values)
    assert helped[0] == whole[0]
    assert same(helped[1], whole[1])
    resumed = trained(StreamedRows(file), tmp_path / "c", str(tmp_path / "a" / "checkpoint-5"), **values)
    assert resumed[0] == whole[0]  # the log of the steps before is the checkpoint's
    assert same(resumed[1], whole[1])


def test_a_stream_is_read_in_the_order_it_says(file, tmp_path):
    stream = StreamedRows(file)
    examples = StreamedExamples(stream, tiny_tokenizer(), SFTConfig(output_dir=str(tmp_path)).render_settings())
    straight = trained(list(iter_some(examples, 32)), tmp_path / "a", train_sampling_strategy="sequential")
    streamed = trained(stream, tmp_path / "b")
    assert streamed[0] == straight[0]
    assert same(streamed[1], straight[1])
    assert same(trained(examples, tmp_path / "c")[1], straight[1])


def iter_some(items: Any, count: int) -> Any:
    for _, item in zip(range(count), items, strict=False):
        yield item


def test_a_streamed_data_set_of_the_hub_is_a_stream_too(tmp_path):
    import datasets

    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    losses, _ = trained(stream, tmp_path, max_steps=5)
    assert len(losses) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_is_broken_later_on_names_its_line(file, tmp_path, workers):
    Path(file).write_text(Path(file).read_text() + '{"prompt": "x"\n')
    with pytest.raises(DataError, match=r"^broken row at .*rows\.jsonl:14: [^\n]*$"):
        trained(StreamedRows(file), tmp_path / "a", dataloader_num_workers=workers)


def test_a_classification_is_evaluated_with_the_labels_of_training(tmp_path):
    rows = [{"text": f"film {i}", "label": ["no", "yes"][i % 2]} for i in range(4)]
    trainer = SFTTrainer(
        model=tiny_model(), args=SFTConfig(output_dir=str(tmp_path)), train_dataset=rows, eval_dataset=rows[:1],
        peft_config=LoraConfig(task_type="CAUSAL_LM"), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        assert "no, yes" in tiny_tokenizer().decode(dataset[0]["input_ids"])
