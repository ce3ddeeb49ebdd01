"""How likely a model finds the answers it should give.

Knows nothing of adapters or files: rendered examples in, one number a supervised token out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn.functional import cross_entropy

from deltaw.data import IGNORE, Collator, Rendered
from deltaw.errors import ConfigError, DataError
from deltaw.evaluate.generate import inference

__all__ = ["LossResult", "supervised_loss"]


@dataclass(frozen=True)
class LossResult:
    """The loss over the supervised tokens of a set of examples.

    Attributes:
        loss: mean negative log-likelihood a supervised token, in nats.
        tokens: how many tokens that is the mean of.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def as_dict(self) -> dict[str, float | int]:
        """Plain numbers, for JSON."""
        return {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}


def supervised_loss(
    model: Any,
    rendered: Sequence[Rendered],
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> LossResult:
    """The mean loss a supervised token over all examples, summed in float64 from float32 log-likelihoods.

    It does not depend on how the examples are batched: every token weighs the same.

    Args:
        model: a causal language model of transformers, or a ``PeftModel`` around one.
        rendered: examples as ``deltaw.data.render_all`` gives them.
        batch_size: examples in one forward pass.
        progress: called with (examples done, all examples).

    Raises:
        ConfigError: ``batch_size`` below 1.
        DataError: no example has a supervised token.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size} must be at least 1")
    device = next(model.parameters()).device
    collate = Collator(pad_token_id=0)  # padding is masked, so any id will do
    order = sorted(range(len(rendered)), key=lambda i: -len(rendered[i].input_ids))
    total, tokens = 0.0, 0
    with inference(model):
        for start in range(0, len(order), batch_size):
            batch = collate([rendered[i].as_features() for i in order[start : start + batch_size]])
            batch = {key: value.to(device) for key, value in batch.items()}
            targets = batch["labels"][:, 1:]  # (batch, length - 1): position t predicts token t + 1
            rows = targets != IGNORE
            if rows.any():
                out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                logits = out.logits[:, :-1][rows].float()  # (supervised, vocabulary)
                total += float(cross_entropy(logits, targets[rows], reduction="none").double().sum())
                tokens += int(rows.sum())
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    if tokens == 0:
        raise DataError(
            f"none of the {len(rendered)} examples has a supervised token: there is no loss to speak of; "
            "look at completion_only_loss, assistant_only_loss and max_length"
        )
    return LossResult(loss=total / tokens, tokens=tokens)
