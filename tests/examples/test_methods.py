"""The comparison of methods with a tiny random model: matched counts, equal data, and going on where it was stopped."""

from __future__ import annotations

import json

import pytest
import torch
from tinychat import tiny_model, tiny_tokenizer

from deltaw.methods import METHODS
from deltaw.skeleton import count_trainable, skeleton
from text_to_sql import methods
from text_to_sql.demo import RECIPE

STEPS = 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(window=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def compare(tiny, tmp_path, monkeypatch, capsys):
    """Runs the program; gives the runs that it made, and what it printed."""
    small = {**RECIPE, "per_device_train_batch_size": 2}
    monkeypatch.setattr(methods, "RECIPE", small)
    made: list[tuple[str, int]] = []
    one_run = methods.one_run

    def counted(method, seed, *args):
        made.append((method, seed))
        return one_run(method, seed, *args)

    monkeypatch.setattr(methods, "one_run", counted)

    def run(*words: str) -> tuple[list[tuple[str, int]], str]:
        made.clear()
        out = [
            "--out",
            str(tmp_path / "out.json"),
            "--model",
            str(tiny),
            "--steps",
            str(STEPS),
            "--questions",
            "2",
            "--train-rows",
            "8",
        ]
        methods.main([*out, *words])
        return list(made), capsys.readouterr().out

    return run


def test_it_goes_on_where_it_was_stopped_and_draws_one_table(compare, tmp_path):
    first, _ = compare("--methods", "lora", "adalora", "--seeds", "1")
    assert first == [("lora", 0), ("adalora", 0)]
    again, text = compare("--methods", "lora", "adalora", "lokr", "--seeds", "2")
    assert again == [("lokr", 0), ("lora", 1), ("adalora", 1), ("lokr", 1)]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| LoRA", "| AdaLoRA", "| LoKr"]
    assert all(" | 2 | " in line for line in lines[2:])
    assert "`wording`" in lines[0]
    assert "`both`" in lines[0]
    kept = json.loads((tmp_path / "out.json").read_text())
    assert len(kept) == 6
    assert all(run["steps"] == STEPS and set(run["scores"]) == {"wording", "both"} for run in kept)
    assert len({run["loss"] for run in kept if run["method"] == "lora"}) == 2  # another seed, other rows
    assert compare("--methods", "lokr", "--seeds", "2")[0] == []
    made, text = compare("--methods", "lokr", "--seeds", "1", "--splits", "seen", "both")  # one of them is new
    assert made == [("lokr", 0)]
    assert "| 2 |" in text
    assert len(json.loads((tmp_path / "out.json").read_text())) == 6


def test_a_run_of_other_settings_is_not_taken_for_this_one(compare):
    assert len(compare("--methods", "lora", "--seeds", "1")[0]) == 1
    assert len(compare("--methods", "lora", "--seeds", "1", "--steps", "1")[0]) == 1


def test_counts_are_matched_on_the_real_shape():
    """SmolLM2-135M, without its weights: within 3.5% of LoRA's 4,884,480 at rank 16, with its alpha / r."""
    base = skeleton("smollm2-135m")
    found = methods.matched(list(METHODS), base, 132)
    assert list(found) == list(METHODS)
    for name, one in found.items():
        assert abs(one.trainable / 4_884_480 - 1) < 0.035, name
        config = methods.configure(name, one.fields, 132)
        alpha = config.alpha if name in ("loha", "lokr") else config.lora_alpha
        assert alpha / (config.init_r if name == "adalora" else config.r) == 2, name
    assert count_trainable(base, methods.configure("dora", found["dora"].fields, 132)) == found["dora"].trainable
    assert all(parameter.device == torch.device("meta") for parameter in base.parameters())
