"""The keys of a run that describe its data: what they take, and what cannot go together."""

from __future__ import annotations

import pytest

from deltaw.config import load_run_config
from deltaw.data.formats import FORMATS
from deltaw.datafields import DataFields
from deltaw.errors import ConfigError

NEEDED = {"model_name_or_path": "base", "dataset_name": "rows.jsonl"}


def test_every_format_can_be_named():
    annotation = DataFields.model_fields["dataset_format"].annotation
    assert set(annotation.__args__) == {"auto", *FORMATS}


def test_what_a_shell_gives_is_read():
    config = load_run_config(
        None,
        {**NEEDED, "dataset_name": "a.jsonl,b/*.csv", "dataset_weights": "[3, 1]", "dataset_label_names": "no,yes"},
    )
    assert config.dataset_name == ["a.jsonl", "b/*.csv"]
    assert config.dataset_weights == [3.0, 1.0]
    assert config.dataset_label_names == ["no", "yes"]


@pytest.mark.parametrize(
    ("given", "key", "why"),
    [
        ({"dataset_weights": [1, 2]}, "dataset_weights", "1 source"),
        ({"dataset_name": ["a", "b"], "dataset_weights": [1, 0]}, "dataset_weights", "above 0"),
        ({"val_group_column": "film"}, "val_group_column", "val_size is 0"),
        ({"dataset_label_names": ["a", "b"], "dataset_format": "alpaca"}, "dataset_label_names", "no labels"),
        ({"dataset_label_names": ["a", "a"]}, "dataset_label_names", "each its own"),
        ({"dataset_format": "preference"}, "dataset_format", "DPO"),
        ({"dataset_format": "alpacca"}, "dataset_format", "alpaca"),
        ({"packing": True, "padding_free": True}, "padding_free", "packed rows"),
        ({"dataset_streaming": True}, "max_steps", "a stream has no length"),
        ({"dataset_streaming": True, "max_steps": 9, "val_size": 0.1}, "val_size", "needs all rows"),
        ({"dataset_streaming": True, "max_steps": 9, "packing": True}, "packing", "needs all rows"),
        ({"dataset_streaming": True, "max_steps": 9, "max_train_samples": 5}, "max_train_samples", "needs all rows"),
        ({"dataset_streaming": True, "max_steps": 9, "dataset_num_proc": 2}, "dataset_num_proc", "dataloader_num_w"),
        (
            {"dataset_streaming": True, "max_steps": 9, "train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy",
            "order of its own",
        ),
        ({"last_turn_only_loss": True, "completion_only_loss": False}, "last_turn_only_loss", "every token"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(given, key, why):
    with pytest.raises(ConfigError, match=rf"command line: {key} = .*{why}"):
        load_run_config(None, {**NEEDED, **given})


def test_a_stream_that_says_how_long_is_fine():
    config = load_run_config(None, {**NEEDED, "dataset_streaming": True, "max_steps": 9, "padding_free": True})
    assert config.dataset_streaming
