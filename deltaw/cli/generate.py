"""``deltaw generate``: the answer to one prompt, written as it is made."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from deltaw.cli.common import Adapter, AsJson, Dtype, Model, emit, load_adapted, working
from deltaw.errors import ConfigError

__all__ = ["generate"]


def generate(
    adapter: Adapter = None,
    model: Model = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; unset: standard input.")] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from this share of the probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, with the chat template that the adapter was trained with."""
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt TEXT, or pipe a text in")
    text = prompt if prompt is not None else sys.stdin.read().rstrip("\n")
    with working():
        loaded = load_adapted(model, adapter, dtype)
        from deltaw.evaluate import stream_answer

        chat = not raw and bool(loaded.tokenizer.chat_template)
        if system is not None and not chat:
            raise ConfigError("--system needs a chat template, and none is used here")
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
    answer = stream_answer(
        loaded.model,
        loaded.tokenizer,
        messages if chat else text,
        (lambda piece: None) if as_json else (lambda piece: print(piece, end="", flush=True)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    emit({"prompt": text, "answer": answer, "model": loaded.name}, as_json, lambda console: print())
