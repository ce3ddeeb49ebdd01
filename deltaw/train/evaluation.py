"""Evaluation while training: figures per token over the whole set, and answers to a few questions.

A part of the trainer. transformers averages the means of batches, so that its loss depends on how examples are batched;
here every token weighs the same. An evaluation leaves modes and random numbers as it found them. Knows nothing of
rows or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import Trainer

from deltaw.data.render import IGNORE
from deltaw.errors import ConfigError, did_you_mean
from deltaw.evaluate.generate import generate_ids, text_of
from deltaw.evaluate.metrics import exact_match, normalize
from deltaw.modules import modes_kept
from deltaw.ops.attention import example_bounds
from deltaw.train.flat import BOUNDS, flat_inputs, require_flat
from deltaw.train.loss import decoder_states
from deltaw.train.parts import base_of
from deltaw.train.resume import same_randomness

__all__ = ["Answer", "TokenEvaluation", "questions_of", "require_metric", "token_scores"]

#: what an evaluation always gives, without its prefix
FIGURES = ("loss", "perplexity", "mean_token_accuracy")
_CHUNK = 1024  # supervised positions whose logits exist at one time


class Answer(NamedTuple):
    """What the model said to one question of the evaluation set."""

    question: str
    answer: str
    expected: str

    @property
    def right(self) -> bool:
        """Whether it is the expected answer, white space aside."""
        return normalize(self.answer) == normalize(self.expected)


class TokenEvaluation(Trainer):
    """Evaluates by tokens, and lets the model answer ``eval_answers`` questions each time.

    Metrics: ``eval_loss``, ``eval_perplexity``, ``eval_mean_token_accuracy`` (greedy, given the right tokens before),
    and with ``eval_answers`` ``eval_exact_match``. A callback's method ``on_answers(state, answers)`` is given them.
    """

    fast: bool
    _sums: Tensor | None = None  # (3,): nll, tokens, right, over the evaluation that runs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``.

        Raises:
            ConfigError: a metric to choose the best by that no evaluation will give, or ``eval_answers`` of rows that
                ask nothing.
        """
        sets = self._eval_sets()
        if self.compute_metrics is None and sets:
            require_metric(
                self.args.metric_for_best_model,
                answers=bool(getattr(self.args, "eval_answers", 0)),
                parts=list(sets) if isinstance(self.eval_dataset, dict) else (),
            )
        if self.args.eval_strategy != "no" and getattr(self.args, "eval_answers", 0):
            for name, dataset in sets.items():
                if not questions_of(dataset, 1, self.args.seed):
                    raise ConfigError(
                        f"eval_answers = {self.args.eval_answers}: no example of {name} asks anything (the loss covers "  # type: ignore[attr-defined]
                        "each from its first token on); evaluate on prompts with answers, or set eval_answers to 0"
                    )
        return super().train(*args, **kwargs)

    def _eval_sets(self) -> Mapping[str, Any]:
        sets: Any = self.eval_dataset
        return sets if isinstance(sets, dict) else {} if sets is None else {"eval_dataset": sets}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``Trainer.evaluate``; neither random numbers nor the modes of modules change."""
        with same_randomness(), modes_kept(self.model):  # type: ignore[arg-type]
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._sums = None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums: Any = self._sums
        self._sums = None
        metrics: Any = output.metrics
        if sums is not None:
            nll, tokens, right = (float(one) for one in sums)
            loss = nll / tokens if tokens else math.nan
            metrics[f"{metric_key_prefix}_loss"] = loss
            metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(loss, 700.0))
            metrics[f"{metric_key_prefix}_mean_token_accuracy"] = right / tokens if tokens else math.nan
        if description == "Evaluation" and getattr(self.args, "eval_answers", 0):
            answers = self._ask(getattr(dataloader, "dataset", None))
            if answers:
                score = exact_match([one.answer for one in answers], [one.expected for one in answers])
                metrics[f"{metric_key_prefix}_exact_match"] = score.value
                for callback in self.callback_handler.callbacks:
                    if hear := getattr(callback, "on_answers", None):
                        hear(self.state, answers)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        if self.compute_loss_func is not None or "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not prediction_loss_only:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            if isinstance(logits, Tensor) and isinstance(labels, Tensor):
                self._add(_scores(labels, lambda row, col: logits[row, col]))
            return loss, logits, labels
        inputs = self._prepare_inputs(inputs)
        whole = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = token_scores(model, inputs, fast=self.fast and whole is model)
        self._add(scores)
        nll, tokens, _ = scores.sum(0)
        return (nll / tokens).float(), None, None

    def _add(self, scores: Tensor) -> None:
        if self.args.world_size > 1:
            gathered: Any = self.accelerator.gather_for_metrics(
                scores
            )  # without the examples that fill up the last batch
            scores = gathered
        total = scores.sum(0)
        self._sums = total if self._sums is None else self._sums + total

    def _ask(self, dataset: Any) -> list[Answer]:
        """The model's answers to questions of the data set, the same ones each time."""
        tokenizer: Any = self.processing_class
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        asked = questions_of(dataset, self.args.eval_answers, self.args.seed)  # type: ignore[attr-defined]
        window = getattr(model.config, "max_position_embeddings", None) or math.inf
        longest = max((len(expected) for _, expected in asked), default=0) + 1  # room to run on, which is wrong
        asked = [(prompt, expected) for prompt, expected in asked if len(prompt) + longest <= window]
        if not asked:
            return []
        with self.compute_loss_context_manager():
            answers = generate_ids(
                model,
                tokenizer,
                [prompt for prompt, _ in asked],
                max_new_tokens=longest,
                batch_size=self.args.eval_batch_size,
            )
        return [
            Answer(tokenizer.decode(prompt, skip_special_tokens=True), answer, text_of(tokenizer, expected))
            for (prompt, expected), answer in zip(asked, answers, strict=True)
        ]


def require_metric(wanted: str | None, *, answers: bool, parts: Sequence[str] = ()) -> None:
    """Whether evaluations will give the metric that the best model is chosen by.

    Args:
        wanted: ``metric_for_best_model``.
        answers: whether questions are asked (``eval_answers``).
        parts: names of the evaluation sets, where there are several.

    Raises:
        ConfigError: they will not.
    """
    names = [*FIGURES, *(["exact_match"] if answers else [])]
    names = [f"{part}_{name}" for part in parts for name in names] if parts else names
    if wanted is not None and wanted.removeprefix("eval_") not in names:
        cure = "; set eval_answers to ask questions" if wanted.endswith("exact_match") else did_you_mean(wanted, names)
        raise ConfigError(f"metric_for_best_model = {wanted!r}: an evaluation gives {', '.join(names)}{cure}")


# --- figures ------------------------------------------------------------------------------------------------------


def token_scores(model: nn.Module, inputs: Mapping[str, Any], *, fast: bool = True) -> Tensor:
    """How well each row of a batch is predicted.

    Args:
        model: a causal language model of transformers, or a ``PeftModel`` of one, in the mode it is in.
        inputs: ``input_ids`` and ``labels`` (b, t), and what else its forward takes.
        fast: only supervised positions go through the head, in chunks; False: the model's own logits.

    Returns:
        (b, 3): the sum of the negative log-likelihoods of its supervised tokens in nats, how many these are, and how
        many of them are the likeliest.
    """
    if fast:
        hidden, head = decoder_states(model, **{name: value for name, value in inputs.items() if name != "labels"})
        return _scores(inputs["labels"], lambda row, col: head(hidden[row, col]))
    given: Any = {name: value for name, value in inputs.items() if name != "labels"}
    flat = False
    if BOUNDS[0] in given:  # several examples in one row
        base = base_of(model)
        flat, given = require_flat(base), flat_inputs(base, given)
    with example_bounds(flat):
        logits = model(**given).logits
    return _scores(inputs["labels"], lambda row, col: logits[row, col])


def _scores(labels: Tensor, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``logits(row, col)`` gives (n, vocabulary) for n positions."""
    wide = torch.float32 if labels.device.type == "mps" else torch.float64  # which that device lacks
    targets = pad(labels[:, 1:], (0, 1), value=IGNORE)  # position t predicts token t + 1
    rows, cols = (targets != IGNORE).nonzero(as_tuple=True)
    scores = torch.zeros(labels.shape[0], 3, dtype=wide, device=labels.device)
    for row, col in zip(rows.split(_CHUNK), cols.split(_CHUNK), strict=True):
        found, target = logits(row, col).float(), targets[row, col]
        nll = cross_entropy(found, target, reduction="none").to(wide)
        scores.index_add_(0, row, torch.stack([nll, torch.ones_like(nll), (found.argmax(-1) == target).to(wide)], 1))
    return scores


# --- questions ----------------------------------------------------------------------------------------------------


def questions_of(dataset: Any, n: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, expected answer) as token ids, of ``n`` examples that the seed draws, or of as many as there are.

    An answer is the last supervised span of an example, its prompt all that comes before it.
    """
    examples = getattr(dataset, "dataset", dataset)  # what packed rows are made of
    found = []
    try:
        order = np.random.default_rng([seed, n]).permutation(len(examples))
    except TypeError:  # a stream: its first ones
        order = None
    for example in examples if order is None else (examples[int(i)] for i in order):
        if len(found) == n:
            break
        ids, labels = list(example["input_ids"]), np.asarray(example["labels"])
        covered = np.flatnonzero(labels != IGNORE)
        if not len(covered):
            continue
        end = int(covered[-1]) + 1
        before = np.flatnonzero(labels[:end] == IGNORE)
        start = int(before[-1]) + 1 if len(before) else 0
        if start > 1:  # the first token of a text is learned from nothing, and asks nothing
            found.append((ids[:start], ids[start:end]))
    return found
