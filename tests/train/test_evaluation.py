"""Evaluation while training: per token, without a trace in the run; answers, the best by a metric, and when to stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated import ROWS, trainer_of

from deltaw import SFTTrainer
from deltaw.data import IGNORE, Collator, Rendered
from deltaw.errors import ConfigError
from deltaw.evaluate import supervised_loss
from deltaw.train.evaluation import Answer, questions_of, token_scores


def by_hand(trainer: SFTTrainer) -> tuple[float, float]:
    """Loss and accuracy of the plain model, one example at a time."""
    nll, right, tokens = 0.0, 0, 0
    model: Any = trainer.model
    model.eval()
    for example in trainer.eval_dataset:  # type: ignore[union-attr]
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        at = labels != IGNORE
        nll -= float(logs[at, labels[at]].sum())
        right += int((logs[at].argmax(-1) == labels[at]).sum())
        tokens += int(at.sum())
    return nll / tokens, right / tokens


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"per_device_eval_batch_size": 3},
        {"fast_loss": False},
        {"padding_free": True},
        {"padding_free": True, "fast_loss": False},
        {"packing": True, "max_length": 64},
    ],
)
def test_every_token_weighs_the_same(tmp_path: Path, values: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path, **values)
    metrics = trainer.evaluate()
    loss, accuracy = by_hand(trainer)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert trainer.state.log_history[-1]["eval_perplexity"] == metrics["eval_perplexity"]  # trackers see it too


def test_metrics_of_predictions_leave_the_loss_exact(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, compute_metrics=lambda found: {"rows": float(len(found.predictions))})
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(by_hand(trainer)[0], rel=1e-5)
    assert metrics["eval_rows"] == len(ROWS)


def test_scores_agree_with_the_evaluation_on_files(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    model: Any = trainer.model.eval()
    examples = [
        Rendered(one["input_ids"], one["labels"], len(one["labels"]))
        for one in trainer.eval_dataset  # type: ignore[union-attr]
    ]
    batch = Collator(0)([one.as_features() for one in examples])
    with torch.no_grad():
        nll, tokens, _ = token_scores(model, batch).sum(0).tolist()
    other = supervised_loss(model, examples)
    assert (nll / tokens, tokens) == (pytest.approx(other.loss, rel=1e-6), other.tokens)


@pytest.mark.parametrize("answers", [0, 3])
def test_a_run_with_evaluations_gives_the_same_bits(tmp_path: Path, answers: int) -> None:
    plain = trainer_of(tmp_path)
    plain.train()
    watched = trainer_of(tmp_path, eval_strategy="steps", eval_steps=1, eval_answers=answers)
    watched.train()
    ours, theirs = (dict(one.model.named_parameters()) for one in (watched, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (watched, plain)]
    assert losses[0] == losses[1]


def test_modes_and_random_numbers_are_left_as_found(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_answers=2)
    trainer.model.train()
    frozen: Any = trainer.model.get_base_model().lm_head
    frozen.eval()
    before = (torch.random.get_rng_state(), np.random.get_state()[1].copy())
    trainer.evaluate()
    assert trainer.model.training
    assert not frozen.training
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


# --- answers


class Ear:
    """A callback with ``on_answers``."""

    def __init__(self) -> None:
        self.heard: list[list[Answer]] = []

    def on_answers(self, state: Any, answers: list[Answer]) -> None:
        self.heard.append(list(answers))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


def test_answers_are_asked_and_scored(tmp_path: Path) -> None:
    ear = Ear()
    trainer = trainer_of(
        tmp_path,
        eval_answers=4,
        eval_strategy="steps",
        eval_steps=60,
        max_steps=120,
        learning_rate=2e-2,
        callbacks=[ear],
    )
    trainer.train()
    metrics = [entry for entry in trainer.state.log_history if "eval_exact_match" in entry]
    assert [entry["step"] for entry in metrics] == [60, 120]
    asked = [[one.question for one in answers] for answers in ear.heard]
    assert asked[0] == asked[1]  # the same ones each time
    assert len(set(asked[0])) == 4
    known = {row["prompt"]: row["completion"] for row in ROWS}
    assert all(known[one.question] == one.expected for one in ear.heard[0])
    shares = [sum(one.right for one in answers) / 4 for answers in ear.heard]
    assert shares == [entry["eval_exact_match"] for entry in metrics]
    assert shares[-1] > 0


def test_questions_are_the_last_supervised_span() -> None:
    several = {"input_ids": [1, 2, 3, 4, 5, 6, 7], "labels": [IGNORE, 2, IGNORE, IGNORE, 5, 6, IGNORE]}
    text = {"input_ids": [1, 2], "labels": [IGNORE, 2]}
    nothing = {"input_ids": [1, 2], "labels": [IGNORE, IGNORE]}
    assert questions_of([text, nothing, several], 2, 0) == [([1, 2, 3, 4], [5, 6])]
    many = [{"input_ids": [9, i, 7], "labels": [IGNORE, IGNORE, 7]} for i in range(50)]
    drawn = questions_of(many, 5, 0)
    assert drawn == questions_of(many, 5, 0) != questions_of(many, 5, 1)
    assert questions_of(iter(many), 2, 0) == [([9, 0], [7]), ([9, 1], [7])]  # a stream: its first


def test_what_asks_nothing_is_told_before_training(tmp_path: Path) -> None:
    rows = [{"text": f"words {i}"} for i in range(8)]
    trainer = trainer_of(tmp_path, eval_dataset=rows, eval_answers=2, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ConfigError, match="no example of eval_dataset asks anything"):
        trainer.train()
    assert trainer.state.global_step == 0


# --- the best


def test_the_best_by_a_metric_whose_smaller_is_better(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="perplexity", learning_rate=3e-2,
    )  # fmt: skip
    assert trainer.args.greater_is_better is False  # transformers' own rule says True
    trainer.train()
    seen = [entry["eval_perplexity"] for entry in trainer.state.log_history if "eval_perplexity" in entry]
    assert trainer.state.best_metric == min(seen)


def test_a_metric_that_no_evaluation_gives_is_told_before_training(tmp_path: Path) -> None:
    same = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "load_best_model_at_end": True,
        "eval_steps": 2,
        "save_steps": 2,
    }
    for name, cure in (("perplexty", "did you mean 'perplexity'"), ("exact_match", "set eval_answers")):
        with pytest.raises(ConfigError, match=f"metric_for_best_model = '{name}'.*{cure}"):
            trainer_of(tmp_path, metric_for_best_model=name, **same).train()
    trainer_of(tmp_path, metric_for_best_model="eval_mean_token_accuracy", max_steps=2, **same).train()
