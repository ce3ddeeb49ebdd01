"""Shared fixtures: tiny random models, made once a session."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
from collections.abc import Callable

import hypothesis
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
# the same examples at each run, and no folder of remembered ones
hypothesis.settings.register_profile("deltaw", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("deltaw")


def build_llama(
    dtype: torch.dtype = torch.float32,
    *,
    tied: bool = False,
    bias: bool = False,
    vocab: int = 128,
    layers: int = 2,
) -> LlamaForCausalLM:
    """Hidden 32, grouped-query attention; the same weights at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, where a mistake would not show
                parameter.normal_(std=0.1)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def _llama() -> LlamaForCausalLM:
    return build_llama()


@pytest.fixture
def llama(_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """A fresh copy of the tiny float32 Llama."""
    return copy.deepcopy(_llama)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    return build_llama


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids (2, 9) for the tiny model."""
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
