"""Training: the config, the trainer, the fast loss. Exact, and on top of transformers' Trainer."""

from deltaw.train.config import SFTConfig
from deltaw.train.loss import causal_lm_loss
from deltaw.train.signals import Interrupted, Terminated
from deltaw.train.steering import SteeringCallback
from deltaw.train.trainer import SFTTrainer

__all__ = ["Interrupted", "SFTConfig", "SFTTrainer", "SteeringCallback", "Terminated", "causal_lm_loss"]
