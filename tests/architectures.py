"""Tiny random causal models of the architectures that are promised to work; a few milliseconds each."""

from __future__ import annotations

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED = {**COMMON, "intermediate_size": 32, "num_key_value_heads": 1}

ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**GATED, "head_dim": 8}),
    "mistral": (MistralForCausalLM, MistralConfig, GATED),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**GATED, "head_dim": 8, "sliding_window": 8}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {**COMMON, "intermediate_size": 32}),
    "opt": (OPTForCausalLM, OPTConfig, {**COMMON, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "phi": (PhiForCausalLM, PhiConfig, {**COMMON, "intermediate_size": 32}),
}


def build(name: str) -> PreTrainedModel:
    """The same weights at each call, in evaluation mode."""
    torch.manual_seed(0)
    model, config, values = ARCHITECTURES[name]
    return model(config(**values)).eval()
