import pytest

from deltaw.data import IGNORE, Collator, render
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
