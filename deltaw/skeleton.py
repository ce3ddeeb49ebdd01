"""A model's layers without its weights: on the meta device, from its ``config.json`` alone.

What is counted on it was made by the same code as in a run, in a second and without memory: adapters are injected as
ever. Knows nothing of any method.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from deltaw.adapters import PeftConfig, inject, remove_adapter, set_active
from deltaw.builtin import BUILT_IN
from deltaw.errors import ModelError
from deltaw.loading import resolve_model

__all__ = ["count_trainable", "skeleton"]

#: the configs of built-in models, so that none is fetched to be counted
_SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


def skeleton(name_or_path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """A causal language model whose parameters have shapes and no values.

    Args:
        name_or_path: a folder, a built-in name (nothing is fetched) or a hub id (its config is).

    Raises:
        ModelError: no config there, or one that is not of a causal language model.
    """
    name = os.fspath(name_or_path)
    if name in BUILT_IN and not os.path.isdir(name):
        config: Any = LlamaConfig(**_SHAPES[name])
    else:
        folder = resolve_model(name)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"model {name!r} has no config that can be read: {reason}") from error
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ModelError(
            f"model {name!r} is a {type(config).__name__}, which is not of a causal language model: name another one"
        ) from error


def count_trainable(base: Any, config: PeftConfig) -> int:
    """How many parameters an adapter trains on ``base`` (a :func:`skeleton`), which is left as it was.

    Raises:
        TargetError, ConfigError: the adapter cannot be put on it.
    """
    name = "counted"
    config = copy.deepcopy(config)  # the layers that "all-linear" means are written into it
    with torch.device("meta"):
        inject(base, config, name, low_cpu_mem_usage=True)
    set_active(base, [name], {name: config})
    count = sum(parameter.numel() for parameter in base.parameters() if parameter.requires_grad)
    remove_adapter(base, name)
    return count
