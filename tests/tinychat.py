"""A chat model small enough for any test: random Llama, two layers, float32, and a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, two marks of a turn, and pad = eos = the end of a turn, as in SmolLM2."""
    special = ["<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )


def tiny_model(seed: int = 0, window: int = 512) -> LlamaForCausalLM:
    """Random weights, large enough that the likeliest token is never a matter of rounding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).float()


def save_tiny(folder: Path) -> Path:
    """Model and tokenizer in a folder, to be named as ``model_name_or_path``."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, n: int = 20, start: int = 0) -> Path:
    """``n`` questions with one-word answers, as jsonl of messages."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(start, start + n):
            messages = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}!"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
