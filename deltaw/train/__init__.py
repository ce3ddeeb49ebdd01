"""Training: the config, the trainer, the fast loss. Exact, and on top of transformers' Trainer."""

from deltaw.train.config import SFTConfig
from deltaw.train.loss import causal_lm_loss
from deltaw.train.steering import SteeringCallback
from deltaw.train.trainer import SFTTrainer

__all__ = ["SFTConfig", "SFTTrainer", "SteeringCallback", "causal_lm_loss"]
