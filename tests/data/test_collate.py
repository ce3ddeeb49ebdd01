import pytest
import torch
from transformers import DataCollatorWithFlattening

from deltaw.data import IGNORE, Collator, FlatCollator, PackedDataset, render
from deltaw.errors import DataError


def test_padding_follows_length_and_not_the_pad_id(smol):
    """pad = eos: the end of the turn must stay in the labels and in the attention mask."""
    assert smol.pad_token_id == smol.eos_token_id
    short, long = (
        render(
            {
                "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": c}],
            },
            smol,
        )
        for c in ("b", "b c d e f")
    )
    batch = Collator(smol.pad_token_id)([short.as_features(), long.as_features()])
    n = len(short.input_ids)
    assert batch["input_ids"][0, :n].tolist() == short.input_ids
    assert batch["labels"][0, :n].tolist() == short.labels
    assert batch["labels"][0, n - 1] == smol.eos_token_id
    assert batch["attention_mask"].sum(1).tolist() == [n, len(long.input_ids)]
    assert batch["labels"][0, n:].unique().tolist() == [IGNORE]
    assert batch["input_ids"][0, n:].unique().tolist() == [smol.pad_token_id]
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}


def test_multiple_of():
    batch = Collator(0, pad_to_multiple_of=8)([{"input_ids": [1] * 9, "labels": [1] * 9}])
    assert batch["input_ids"].shape == (1, 16)
    assert batch["attention_mask"].sum() == 9


def test_faults():
    with pytest.raises(DataError, match="at least one example"):
        Collator(0)([])
    with pytest.raises(DataError, match="2 input_ids, 1 labels"):
        Collator(0)([{"input_ids": [1, 2], "labels": [1]}])


EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [5, IGNORE, 7]},
    {"input_ids": [8], "labels": [8]},
    {"input_ids": [9, 10], "labels": [IGNORE, 10]},
]


def test_flat_is_one_row_that_says_where_examples_end():
    batch = FlatCollator()(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    # nothing is predicted across a border: the first token of each example has no label
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7, IGNORE, IGNORE, 10]]
    for side in "qk":
        assert batch[f"cu_seq_lens_{side}"].tolist() == [0, 3, 4, 6]
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch[f"max_length_{side}"] == 3
    assert set(FlatCollator(bounds=False)(EXAMPLES)) == {"input_ids", "labels", "position_ids"}


def test_flat_has_as_many_items_as_padded():
    """What the loss is divided by: labels from the second place on."""
    flat, padded = FlatCollator()(EXAMPLES), Collator(0)(EXAMPLES)
    counts = [(batch["labels"][..., 1:] != IGNORE).sum() for batch in (flat, padded)]
    assert counts[0] == counts[1] == 2


def test_a_packed_row_is_flattened_example_by_example():
    packed = PackedDataset(EXAMPLES, 4)
    batch = FlatCollator()(packed[:])
    again = FlatCollator()([EXAMPLES[i] for members in packed.packs for i in members])
    assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(again[key])) for key in again)
    with pytest.raises(DataError, match="FlatCollator"):
        Collator(0)(packed[:])


def test_flat_agrees_with_transformers():
    features = [{"input_ids": e["input_ids"], "labels": e["labels"]} for e in EXAMPLES]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)(features)
    ours = FlatCollator()(EXAMPLES)
    for key, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value)), key


def test_faults_of_flat_batches():
    for features, told in (
        ([], "at least one example"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids, 1 labels"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "seq_lengths": [1]}], r"seq_lengths \[1\] of 2"),
        ([{"input_ids": [], "labels": []}], "at least one token"),
    ):
        with pytest.raises(DataError, match=told):
            FlatCollator()(features)
