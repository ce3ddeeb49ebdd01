"""Floor 4: how good a model is, by its answers and by its likelihoods."""

from deltaw.evaluate.generate import generate_batch, stream_answer
from deltaw.evaluate.likelihood import LossResult, supervised_loss
from deltaw.evaluate.metrics import Score, exact_match, wilson_interval

__all__ = [
    "LossResult",
    "Score",
    "exact_match",
    "generate_batch",
    "stream_answer",
    "supervised_loss",
    "wilson_interval",
]
