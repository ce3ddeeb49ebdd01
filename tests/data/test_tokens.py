"""Flat arrays say what the renderer said, in memory, mapped from files, pickled, and through a data loader."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokensets import rendered, same
from torch.utils.data import DataLoader

from deltaw.data import Collator, Rendered, TokenDataset
from deltaw.data.render import IGNORE
from deltaw.data.tokenfiles import TokenWriter
from deltaw.errors import DataError
from deltaw.held import new_folder

EXAMPLES = [
    Rendered([5, 6, 7], [IGNORE, 6, 7], 3),
    Rendered([1] * 9, [IGNORE] * 4 + [1] * 5, 12, 3),
    Rendered([2, 3], [IGNORE, IGNORE], 2),
]


@pytest.fixture
def mapped(tmp_path):
    with TokenWriter(lambda: new_folder(tmp_path, "t-"), memory=0) as writer:
        writer.add(TokenDataset.of(EXAMPLES[:2], [0, 4], dropped=3))
        writer.add(TokenDataset.of(EXAMPLES[2:], [4]))
        return writer.finish("name")


@given(st.lists(rendered(), max_size=6))
def test_examples_come_back_as_they_were(examples):
    tokens = TokenDataset.of(examples)
    assert [tokens.rendered(i) for i in range(len(tokens))] == examples
    assert list(tokens) == [example.as_features() for example in examples] == tokens[:]
    assert tokens.lengths.tolist() == [len(example.input_ids) for example in examples]
    assert tokens.tokens == sum(tokens.lengths)
    assert same(pickle.loads(pickle.dumps(tokens)), tokens)


def test_examples_are_found_from_both_ends_and_not_beyond():
    tokens = TokenDataset.of(EXAMPLES)
    assert tokens[-1] == tokens[2] == EXAMPLES[2].as_features()
    assert tokens[::-2] == [tokens[2], tokens[0]]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"example {index} of 3"):
            tokens[index]


def test_a_mapped_set_is_the_same_and_cannot_be_written(mapped):
    plain = TokenDataset.of(EXAMPLES, [0, 4, 4], dropped=3)
    assert same(mapped, plain)
    assert (mapped.fingerprint, mapped.made, plain.folder) == ("name", "", None)
    with pytest.raises(ValueError, match="read-only"):
        mapped.ids[0] = 1


def test_a_mapped_set_is_pickled_as_the_name_of_its_folder(mapped):
    pickled = pickle.dumps(mapped)
    assert len(pickled) < 1000
    assert str(mapped.folder).encode() in pickled
    again = pickle.loads(pickled)
    assert same(again, mapped)
    assert again.folder == mapped.folder
    assert again.fingerprint == "name"


def test_a_changed_copy_of_a_mapped_set_is_pickled_with_its_own_arrays(mapped):
    changed = dataclasses.replace(mapped, ids=mapped.ids + 1)
    assert np.array_equal(pickle.loads(pickle.dumps(changed)).ids, mapped.ids + 1)


def test_the_files_go_with_the_last_copy_of_a_set(mapped):
    folder = mapped.folder
    copy = dataclasses.replace(mapped, fingerprint="other")
    del mapped
    assert pickle.loads(pickle.dumps(copy)).fingerprint == "other"
    assert folder.is_dir()


def test_files_are_gone_when_nobody_has_the_set(tmp_path):
    with TokenWriter(lambda: new_folder(tmp_path, "t-"), memory=0) as writer:
        writer.add(TokenDataset.of(EXAMPLES))
        tokens = writer.finish()
    assert len(list(tmp_path.iterdir())) == 1
    del tokens
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_takes_it(mapped, workers):
    loader = DataLoader(mapped, batch_size=2, collate_fn=Collator(0), num_workers=workers)
    batches = list(loader)
    for batch, examples in zip(batches, (EXAMPLES[:2], EXAMPLES[2:]), strict=True):
        expected = Collator(0)([example.as_features() for example in examples])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert mapped.folder.is_dir()  # a worker that ends takes nothing away


def test_no_examples_at_all(tmp_path):
    with TokenWriter(lambda: new_folder(tmp_path, "t-"), memory=0) as writer:
        tokens = writer.finish()
    assert (len(tokens), tokens.tokens, list(tokens)) == (0, 0, [])
    assert same(tokens, TokenDataset.of([]))


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "format", "counts", "no marker", "no json"])
def test_files_that_do_not_fit_are_refused(mapped, damage):
    ids, marker = mapped.folder / "ids.bin", mapped.folder / "tokens.json"
    said = json.loads(marker.read_text())
    if damage in {"shorter", "longer"}:
        data = ids.read_bytes()
        ids.write_bytes(data[:-1] if damage == "shorter" else data + b"\0")
    elif damage == "gone":
        ids.unlink()
    elif damage == "format":
        marker.write_text(json.dumps(said | {"format": 0}))
    elif damage == "counts":
        marker.write_text(json.dumps(said | {"tokens": None}))
    elif damage == "no marker":
        marker.unlink()
    else:
        marker.write_text("{")
    with pytest.raises(DataError, match=r"token files|ids\.bin has"):
        TokenDataset.open(mapped.folder)
