"""The loss a supervised token: a mean over tokens, not over examples or batches."""

from __future__ import annotations

import math

import pytest
import torch
from tinychat import tiny_model, tiny_tokenizer

from deltaw.data import IGNORE, Rendered, render_all
from deltaw.errors import ConfigError, DataError
from deltaw.evaluate import LossResult, supervised_loss

ROWS = [
    {"messages": [{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "a" * (9 - n)}]}
    for n in (1, 5, 8, 3)
]


def test_it_is_the_mean_over_supervised_tokens_whatever_the_batches():
    model, rendered = tiny_model(), render_all(ROWS, tiny_tokenizer())
    total = tokens = 0.0
    for one in rendered:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([one.input_ids])).logits[0].double().log_softmax(-1)
        for t, label in enumerate(one.labels[1:]):
            if label != IGNORE:
                total -= float(logprobs[t, label])
                tokens += 1
    for batch_size in (1, 3, 8):
        result = supervised_loss(model, rendered, batch_size)
        assert result.tokens == tokens == sum(one.supervised for one in rendered)
        assert result.loss == pytest.approx(total / tokens, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_the_mode_is_kept():
    model = tiny_model().train()
    supervised_loss(model, render_all(ROWS, tiny_tokenizer()))
    assert model.training


def test_no_supervised_token_is_an_error_not_a_zero():
    with pytest.raises(DataError, match="none of the 1 examples has a supervised token"):
        supervised_loss(tiny_model(), [Rendered([1, 2, 3], [IGNORE] * 3, 3)])
    with pytest.raises(ConfigError, match="batch_size = 0"):
        supervised_loss(tiny_model(), [], 0)


def test_a_hopeless_loss_has_an_infinite_perplexity():
    assert LossResult(1e4, 1).perplexity == math.inf
