"""The parts of a causal language model of transformers, asked of the model itself. Knows nothing of losses."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from deltaw.errors import ModelError
from deltaw.model import PeftModel

__all__ = ["bare", "base_of", "decoder_of"]


def bare(model: nn.Module) -> nn.Module:
    """``model`` without the adapters' wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_of(model: nn.Module) -> PreTrainedModel:
    """The model of transformers, without the adapters' wrapper.

    Raises:
        ModelError: it is none.
    """
    base = bare(model)
    if not isinstance(base, PreTrainedModel):
        raise ModelError(
            f"causal_lm_loss needs a causal language model of transformers, got {type(base).__name__}; "
            "compute the loss with the model's own forward"
        )
    return base


def decoder_of(base: PreTrainedModel) -> nn.Module:
    """The part that turns tokens into the hidden states (b, t, d) that the head reads; ``base`` itself if there is no
    such part."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return base.base_model if decoder is None or decoder is base else decoder
