"""Answers of a model: greedy and batched for scores, one at a time and streamed for people.

Knows nothing of metrics, files or the command line. The model, its mode, its generation config and its
tokenizer are left as they were found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from deltaw.data import RenderSettings, render_prompt, stop_token_ids
from deltaw.errors import ConfigError, DataError
from deltaw.modules import modes_kept

__all__ = [
    "Prompt",
    "as_prompt_ids",
    "generate_batch",
    "generate_ids",
    "inference",
    "stream_answer",
    "text_of",
]

# A text to continue, a conversation to answer, or a row of a data set (an answer in it is not read).
Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    settings: RenderSettings | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[str]:
    """The greedy answer to each prompt, in the order of ``prompts``; the same as one prompt a time gives.

    Prompts of like length share a batch, padded on the left and masked. An answer ends at the tokenizer's eos
    or at the token with which the chat template closes a turn; special tokens are left out of the text.

    Args:
        model: a causal language model of transformers, or a ``PeftModel`` around one.
        prompts: see :data:`Prompt`; a text is continued as it is, a conversation goes through the template.
        max_new_tokens: most tokens an answer may have.
        batch_size: prompts generated together.
        settings: how rows are rendered.
        progress: called with (prompts done, all prompts).

    Raises:
        ConfigError: ``max_new_tokens`` or ``batch_size`` below 1.
        DataError: prompts that are empty, or that leave no room for an answer in the model's window.
    """
    _require_sizes(max_new_tokens, batch_size)
    ids = [as_prompt_ids(prompt, tokenizer, settings) for prompt in prompts]
    return generate_ids(
        model,
        tokenizer,
        ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        stops=stop_token_ids(tokenizer, None if settings is None else settings.chat_template),
    )


def generate_ids(
    model: Any,
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Callable[[int, int], object] | None = None,
    stops: list[int] | None = None,
) -> list[str]:
    """As :func:`generate_batch`, for prompts that are token ids already.

    Args:
        stops: ids that end an answer; None: the tokenizer's.
    """
    _require_sizes(max_new_tokens, batch_size)
    _require_room(model, ids, max_new_tokens)
    stops = stop_token_ids(tokenizer) if stops is None else stops
    pad = _pad_id(tokenizer, stops)
    config = _generation_config(max_new_tokens, stops, pad)
    device = next(model.parameters()).device
    # the longest first: if memory is short, it shows at once
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    answers = [""] * len(ids)
    with inference(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(ids[batch[0]])
            input_ids = torch.full((len(batch), width), pad, dtype=torch.int64)  # (batch, longest prompt)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                input_ids[row, width - len(ids[i]) :] = torch.tensor(ids[i])
                attention_mask[row, width - len(ids[i]) :] = 1
            out = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
            )
            for row, i in enumerate(batch):
                answers[i] = text_of(tokenizer, out[row, width:].tolist(), stops)
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return answers


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    on_text: Callable[[str], object],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    settings: RenderSettings | None = None,
) -> str:
    """The answer to one prompt, handed to ``on_text`` piece by piece as it is made, then returned whole.

    Args:
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: draw from the likeliest tokens that hold this share of the probability.
        seed: makes the draws repeatable; the global random state is left alone then.

    Raises:
        ConfigError: a temperature below 0, or ``top_p`` outside (0, 1].
        DataError: as :func:`generate_batch`.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ConfigError(
            f"temperature = {temperature} must be 0 or more, top_p = {top_p} above 0 and at most 1, "
            f"max_new_tokens = {max_new_tokens} at least 1"
        )
    ids = as_prompt_ids(prompt, tokenizer, settings)
    _require_room(model, [ids], max_new_tokens)
    stops = stop_token_ids(tokenizer, None if settings is None else settings.chat_template)
    config = _generation_config(max_new_tokens, stops, _pad_id(tokenizer, stops), temperature, top_p)
    device = next(model.parameters()).device
    streamer = _Pieces(tokenizer, on_text)
    input_ids = torch.tensor([ids], device=device)  # (1, prompt)
    devices = [device] if device.type == "cuda" else []
    with inference(model), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        out = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=streamer,
        )
    return text_of(tokenizer, out[0, len(ids) :].tolist(), stops)


def as_prompt_ids(prompt: Prompt, tokenizer: Any, settings: RenderSettings | None = None) -> list[int]:
    """The ids a prompt is answered from, as training saw them before an answer.

    A control token that is written in the prompt (``<|im_end|>``) is plain text here, as it is in training.

    Raises:
        DataError: an empty prompt, or one that the chat template refuses.
    """
    settings = settings if settings is not None else RenderSettings()
    row: Mapping[str, Any]
    if isinstance(prompt, Mapping):
        row = prompt
    else:
        row = {settings.text_field: prompt} if isinstance(prompt, str) else {"messages": list(prompt)}
        settings = dataclasses.replace(settings, dataset_format="auto")  # that is said of rows
    ids = render_prompt(row, tokenizer, settings)
    if not ids:
        raise DataError("an empty prompt has nothing to be continued: give it some text")
    return ids


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    with modes_kept(model), torch.inference_mode():
        model.eval()
        yield


class _Pieces(TextStreamer):
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def _generation_config(
    max_new_tokens: int, stops: list[int], pad: int, temperature: float = 0.0, top_p: float = 1.0
) -> GenerationConfig:
    """Every field that changes the choice is given, so that none of the model's own defaults creeps in."""
    sample = temperature > 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        temperature=temperature if sample else 1.0,
        top_p=top_p if sample else 1.0,
        top_k=0 if sample else 50,  # 50 is the library's neutral value when nothing is drawn
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=True,
    )


def _pad_id(tokenizer: Any, stops: list[int]) -> int:
    """Any id will do, since padding is masked; the tokenizer's own where it has one."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return stops[0] if stops else 0


def text_of(tokenizer: Any, ids: Sequence[int], stops: Sequence[int] | None = None) -> str:
    """The text of an answer: up to its stop token (None: the tokenizer's), without special tokens."""
    stops = stop_token_ids(tokenizer) if stops is None else stops
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True)


def _require_sizes(max_new_tokens: int, batch_size: int) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens} and batch_size = {batch_size} must be at least 1")


def _require_room(model: Any, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    window = getattr(model.config, "max_position_embeddings", None)
    if window is None:
        return
    long = [(i, len(one)) for i, one in enumerate(ids) if len(one) + max_new_tokens > window]
    if long:
        shown = ", ".join(f"prompt {i} ({n:,} tokens)" for i, n in long[:5])
        raise DataError(
            f"{len(long)} of {len(ids)} prompts leave no room for {max_new_tokens} new tokens in the "
            f"model's window of {window:,}: {shown}; shorten them or lower max_new_tokens"
        )
