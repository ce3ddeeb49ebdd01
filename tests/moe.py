"""Tiny mixtures of experts, float32 or bf16, random."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, head_dim=16
    ),
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
}


def tiny_moe(kind: str, dtype: torch.dtype = torch.float32, experts: str = "eager") -> Any:
    """The same weights at each call, large enough that experts matter."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=experts).eval()
