"""The keys of a run that describe its data, named as in ``SFTConfig`` and ``ScriptArguments``.

Knows nothing of the rest of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

from pydantic import BaseModel

from deltaw.adapterfields import Fault
from deltaw.fieldtypes import Int, Names, Pieces, Shares, setting
from deltaw.findings import name_faults

__all__ = ["DATA_GROUP", "DataFields"]

DATA_GROUP = "Data"
_data = partial(setting, DATA_GROUP)


class DataFields(BaseModel):
    """The data of a run: where rows come from, what of them is learned, and how they become batches."""

    dataset_name: Pieces = _data(
        ..., "Training rows: a file (jsonl, json, csv, parquet), a folder, a glob, a hub id, or several of these."
    )
    dataset_weights: Shares | None = _data(
        None, "How often each of several sources is drawn from, as shares; unset: all their rows once."
    )
    dataset_format: Literal[
        "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "text", "classification", "preference"
    ] = _data("auto", "Format of the rows; auto looks at their keys.")
    dataset_label_names: Names | None = _data(
        None, "Labels of a classification, in the order of their numbers; unset: the names that the rows give."
    )
    dataset_streaming: bool = _data(False, "Read rows while training, for data that does not fit in memory or disk.")
    dataset_num_proc: Int | None = _data(None, "Processes that tokenize; unset: as many as help.", gt=0)
    dataset_cache: bool = _data(True, "Keep the tokens of this data, tokenizer, template and options for the next run.")
    dataset_train_split: str = _data("train", "Split of the dataset to train on.")
    dataset_test_split: str | None = _data(None, "Split of the dataset to evaluate on.")
    eval_dataset_name: Pieces | None = _data(None, "Evaluation rows from a dataset of their own.")
    val_size: float = _data(0.0, "Share of the training rows to hold out for evaluation.", ge=0, lt=1)
    val_group_column: str | None = _data(
        None, "Rows with the same value in this column stay on one side of the split made by val_size."
    )
    max_train_samples: Int | None = _data(None, "Train on N rows, drawn by the seed.", gt=0)
    max_eval_samples: Int | None = _data(None, "Evaluate on N rows.", gt=0)
    dataset_text_field: str = _data("text", "Column of plain-text rows.")
    max_length: Int = _data(1024, "Longest example, in tokens.", gt=1)
    overlong: Literal["error", "drop", "truncate_prompt", "truncate"] = _data(
        "error",
        "A longer example: refuse it, leave it out, cut its prompt from the left, or cut its end, answer included.",
    )
    chat_template_path: str | None = _data(
        None, "A jinja file, or a template by name (chatml, ...), to use in place of the tokenizer's."
    )
    packing: bool = _data(False, "Join short examples into full rows; attention never crosses examples.")
    padding_free: bool = _data(False, "A batch is one row without padding; attention never crosses examples.")
    completion_only_loss: bool | None = _data(
        None, "Train on the completion only; unset: yes wherever there is a prompt."
    )
    assistant_only_loss: bool = _data(False, "Train on the assistant's turns and on nothing else.")
    last_turn_only_loss: bool = _data(False, "Train on the last answer of a conversation only.")
    allow: Names = _data([], "Findings of deltaw check that shall not stop the run, by name.")

    def data_faults(self) -> Iterator[Fault]:
        """What cannot work, or would be read by nothing."""

        def fault(name: str, why: str, cure: str) -> Fault:
            return Fault(name, getattr(self, name), why, cure)

        sources = self.dataset_name if isinstance(self.dataset_name, list) else [self.dataset_name]
        if self.dataset_weights is not None:
            if len(self.dataset_weights) != len(sources):
                yield fault("dataset_weights", f"{len(sources)} source(s) in dataset_name", "one weight for each")
            elif any(weight <= 0 for weight in self.dataset_weights):
                yield fault("dataset_weights", "a weight must be above 0", "leave out a source that is not wanted")
        if self.dataset_label_names is not None:
            if self.dataset_format not in ("auto", "classification"):
                cure = "dataset_format: classification"
                yield fault("dataset_label_names", f"rows of {self.dataset_format} have no labels", cure)
            if not self.dataset_label_names or len(set(self.dataset_label_names)) < len(self.dataset_label_names):
                yield fault("dataset_label_names", "labels need names, each its own", "[name of 0, name of 1, ...]")
        if self.dataset_format == "preference":
            why = "supervised training would lose which of the two answers is the better"
            yield fault("dataset_format", why, "train with DPO (docs/data.md), or name the chosen answer completion")
        if self.val_group_column and not self.val_size:
            yield fault("val_group_column", "nothing reads it while val_size is 0", "val_size: 0.1")
        if self.packing and self.padding_free:
            yield fault("padding_free", "packed rows have no padding already", "keep one of the two")
        if self.dataset_streaming:
            for name in ("val_size", "packing", "max_train_samples", "dataset_weights"):
                if self.changed_data(name):
                    yield fault(name, "it needs all rows, which dataset_streaming never has", "leave out one of them")
            if self.dataset_num_proc:
                cure = "dataloader_num_workers: N renders in N processes"
                yield fault("dataset_num_proc", "nothing reads it: a stream is rendered by the data loader", cure)
        for why in name_faults(self.allow):
            yield fault("allow", why, "deltaw check prints the names in square brackets")
        if self.last_turn_only_loss and self.completion_only_loss is False:
            yield fault("last_turn_only_loss", "completion_only_loss: false trains on every token", "keep one of them")

    def changed_data(self, name: str) -> bool:
        """Whether a key differs from its default."""
        return getattr(self, name) != DataFields.model_fields[name].default
