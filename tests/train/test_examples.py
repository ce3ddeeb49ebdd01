"""Whatever a trainer is given becomes tokens, once, checked; what are tokens already stay as they are."""

import logging

import pytest
from datasets import ClassLabel, Dataset
from tinychat import tiny_tokenizer
from tokensets import conversation, question, same

from deltaw import SFTConfig
from deltaw.data import PackedDataset, StreamedExamples, TokenDataset, tokenize_rows
from deltaw.errors import ConfigError, DataError
from deltaw.train.examples import token_sets

ROWS = [question(i) for i in range(12)]
OTHERS = [conversation(i) for i in range(3)]


@pytest.fixture
def args(tmp_path):
    return SFTConfig(output_dir=str(tmp_path), max_length=120)


def sets(args, train, evaluation=None):
    return token_sets(train, evaluation, tiny_tokenizer(), args)


def test_rows_become_the_tokens_that_they_are_anywhere_else(args):
    train, evaluation, same_args = sets(args, ROWS, OTHERS)
    assert same(train, tokenize_rows(ROWS, tiny_tokenizer(), args.render_settings()))
    assert same(evaluation, tokenize_rows(OTHERS, tiny_tokenizer(), args.render_settings()))
    assert same_args is args


def test_a_dataset_is_read_row_by_row(args, monkeypatch):
    monkeypatch.setattr("deltaw.train.examples.as_rows", lambda rows: pytest.fail("all rows in a list"))
    train, _, _ = sets(args, Dataset.from_list(ROWS))
    assert same(train, tokenize_rows(ROWS, tiny_tokenizer(), args.render_settings()))


def test_a_data_frame_is_rows_and_a_name_is_not(args):
    assert same(sets(args, Dataset.from_list(ROWS).to_pandas())[0], sets(args, ROWS)[0])
    for given, said in (("train.jsonl", "is a name, not rows"), ({"train": ROWS}, "not a mapping")):
        with pytest.raises(DataError, match=said):
            sets(args, given)


def test_the_classes_of_a_dataset_are_asked_for_by_their_names_in_both_sets(args):
    rows = [{"text": f"film {i}", "label": i % 2} for i in range(8)]
    dataset = Dataset.from_list(rows).cast_column("label", ClassLabel(names=["rotten", "fresh"]))
    held_out = dataset.select([0, 2])  # one class alone
    train, evaluation, with_names = sets(args, dataset.select([1, 3, 4, 5]), held_out)
    assert sorted(with_names.dataset_label_names or []) == ["fresh", "rotten"]
    for tokens in (train, evaluation):
        assert "fresh, rotten" in tiny_tokenizer().decode(tokens[0]["input_ids"])


def test_tokens_stay_as_they_are(args):
    tokens = tokenize_rows(ROWS, tiny_tokenizer())
    features = list(tokens)
    packed = PackedDataset(tokens, 120, 0)
    for given in (tokens, features, packed, Dataset.from_list(features), None):
        assert sets(args, given)[0] is given
    stream = StreamedExamples(ROWS, tiny_tokenizer(), args.render_settings(), passes=1)
    assert isinstance(sets(args, stream)[0], StreamedExamples)


def test_several_sets_to_evaluate_on(args):
    _, evaluation, _ = sets(args, ROWS, {"a": OTHERS, "b": tokenize_rows(OTHERS, tiny_tokenizer())})
    assert {name: type(part) for name, part in evaluation.items()} == {"a": TokenDataset, "b": TokenDataset}
    assert same(evaluation["a"], evaluation["b"])


@pytest.mark.parametrize("where", ["train", "eval", "one of several"])
def test_what_is_wrong_stops_it_wherever_it_is_unless_it_is_allowed(args, where):
    long = [*OTHERS, {"prompt": "x", "completion": "y" * 200}]
    train = long if where == "train" else ROWS
    evaluation = {"train": None, "eval": long, "one of several": {"a": OTHERS, "b": long}}[where]
    with pytest.raises(DataError, match="truncated-answer"):
        sets(args, train, evaluation)
    args.allow = ["truncated-answer"]
    assert len(sets(args, train, evaluation)[0]) == len(train)
    args.allow = ["truncated-anser"]
    with pytest.raises(ConfigError, match="truncated-answer"):
        sets(args, train, evaluation)


def test_findings_are_told_and_an_overlap_that_the_caller_made_stops_nothing(args, caplog):
    caplog.set_level(logging.INFO, "deltaw")
    sets(args, ROWS, ROWS[:4])
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("train-eval-overlap" in text or "trained on" in text for text in told)


def test_tokens_come_from_the_cache_if_that_is_wanted(args, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_HOME", str(tmp_path / "home"))
    args.dataset_cache = True
    first, again = sets(args, ROWS)[0], sets(args, ROWS)[0]
    assert same(first, again)
    assert not first.made
    assert again.made


def test_tokens_made_elsewhere_pass_but_a_masked_end_is_told(args, caplog):
    tokenizer = tiny_tokenizer()
    features = list(tokenize_rows(ROWS, tokenizer))
    masked = [
        {**one, "labels": [-100 if label == tokenizer.pad_token_id else label for label in one["labels"]]}
        for one in features
    ]
    with caplog.at_level(logging.WARNING, "deltaw"):
        sets(args, features)
        assert caplog.messages == []
        assert sets(args, masked)[0] is masked
    assert len(caplog.messages) == 1
    assert "12 examples looked at: 12 of 12 examples do not supervise a stop token" in caplog.messages[0]
