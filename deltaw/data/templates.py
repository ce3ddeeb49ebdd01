"""Chat templates: the tokenizer's own, one of ours by name, or a jinja file. Knows nothing of rows or masks.

The named ones are files in ``templates/``, written for this package. The first line of each says which tokens it is
made of, and none begins with BOS: it is put in front where the tokenizer begins plain text with it, so that every
tokenizer sees exactly the beginning that it was trained with.
"""

from __future__ import annotations

import functools
import re
import weakref
from importlib import resources
from pathlib import Path
from typing import Any

from deltaw.errors import ConfigError, did_you_mean

__all__ = ["TEMPLATES", "begins_with_bos", "resolve_template", "template_text", "use_template"]

#: name -> what it is
TEMPLATES = {
    "alpaca": "### Instruction: and ### Response:, for base models; no token but eos",
    "chatml": "<|im_start|>role ... <|im_end|>, with tools",
    "gemma": "<start_of_turn>user ... <end_of_turn>; no system role",
    "llama3": "<|start_header_id|>role<|end_header_id|> ... <|eot_id|>, with tools",
    "mistral": "[INST] ... [/INST] answer, with tools; a system message goes into the first user message",
    "phi3": "<|user|> ... <|end|>",
    "qwen3": "ChatML with thinking and tools; the thoughts of earlier turns are left out",
    "zephyr": "<|user|> ... eos",
}
_known: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()
_NEEDS = re.compile(r"\{#- needs: (.*?) -#\}")


def resolve_template(chat_template: str, tokenizer: Any) -> str:
    """The text of a template.

    Args:
        chat_template: the text itself, one of `TEMPLATES`, or the path of a jinja file.
        tokenizer: the one that the template is for.

    Raises:
        ConfigError: none of these, or a named template made of special tokens that the tokenizer lacks.
    """
    if "{" in chat_template:
        return chat_template
    if chat_template in TEMPLATES:
        text = _named(chat_template)
        _require_tokens(chat_template, text, tokenizer)
        return "{{ bos_token }}" + text if begins_with_bos(tokenizer) else text
    path = Path(chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(chat_template, path, error)) from error


def use_template(tokenizer: Any, chat_template: str | None) -> Any:
    """The tokenizer, with that template as its own: so it is saved with it, and used wherever it is read again.

    Raises:
        ConfigError: as `resolve_template`.
    """
    if chat_template is not None:
        tokenizer.chat_template = resolve_template(chat_template, tokenizer)
    return tokenizer


def template_text(tokenizer: Any, chat_template: str | None = None, tools: Any = None) -> str | None:
    """The template that renders a conversation: the given one, else the tokenizer's (of several, the one for tools).

    Raises:
        ConfigError: as `resolve_template`.
    """
    if chat_template is not None:
        return _resolved(chat_template, tokenizer)
    if isinstance(tokenizer.chat_template, str | None):
        return tokenizer.chat_template
    return tokenizer.get_chat_template(None, tools)


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS before plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]


def _resolved(chat_template: str, tokenizer: Any) -> str:
    """The same for each row of a data set: a file is read once."""
    if "{" in chat_template:
        return chat_template
    known = _known.setdefault(tokenizer, {})
    if chat_template not in known:
        known[chat_template] = resolve_template(chat_template, tokenizer)
    return known[chat_template]


@functools.cache
def _named(name: str) -> str:
    return (resources.files("deltaw.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _require_tokens(name: str, text: str, tokenizer: Any) -> None:
    needs = _NEEDS.match(text)
    assert needs is not None
    lacks = [token for token in needs[1].split() if not _has(tokenizer, token)]
    if lacks:
        raise ConfigError(
            f"chat_template {name!r} is made of {needs[1].split()}, and the tokenizer lacks {lacks}: take another "
            "('alpaca' needs no token but eos), or add them with tokenizer.add_special_tokens, resize the model's "
            "embedding and train the new rows (trainable_token_indices)"
        )


def _has(tokenizer: Any, token: str) -> bool:
    if token.endswith("_token"):
        return getattr(tokenizer, token) is not None
    return token in tokenizer.get_added_vocab()


def _not_found(chat_template: str, path: Path, error: Exception) -> str:
    if path.is_file():
        return f"chat_template {chat_template!r} cannot be read: {error}"
    siblings = [entry.name for entry in path.parent.glob("*.jinja")] if path.parent.is_dir() else []
    near = did_you_mean(chat_template, TEMPLATES) or did_you_mean(path.name, siblings)
    return f"chat_template {chat_template!r} is neither a template nor a file; by name there are {[*TEMPLATES]}{near}"
