"""What a run was made of: fingerprints of its base, its data and its template, and the versions it ran on.

Knows nothing of how a run is done.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["base_fingerprint", "rows_fingerprint", "text_fingerprint", "tokenizer_fingerprint", "versions"]

_EDGE = 1 << 20  # bytes read at each end of a weight file
_PACKAGES = ("deltaw", "torch", "transformers", "accelerate", "safetensors", "numpy")
#: attributes of a tokenizer that change what it does with a text
_TOKENIZER_SETTINGS = (
    "split_special_tokens",
    "add_prefix_space",
    "add_bos_token",
    "add_eos_token",
    "chat_control_tokens",
)
_PLACES = ("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "_commit_hash")


def base_fingerprint(folder: str | Path) -> str | None:
    """A fingerprint of the weights and the config in a local folder; None where there is no such folder.

    Of each safetensors file its name, size, and first and last MiB count: any retrained or requantized model
    differs there, and a large model is fingerprinted in milliseconds. It is no defence against a forger.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as data:
            digest.update(data.read(_EDGE))
            data.seek(max(0, size - _EDGE))
            digest.update(data.read(_EDGE))
    return digest.hexdigest()


def rows_fingerprint(rows: Iterable[Mapping[str, Any]], *, keys_in_order: bool = False) -> str:
    """A fingerprint of the rows and their order.

    Args:
        rows: read once, one at a time.
        keys_in_order: the order of the keys within rows counts as well: a chat template writes the keys of tools so.
    """
    digest = hashlib.sha256()
    encoder = json.JSONEncoder(sort_keys=not keys_in_order, ensure_ascii=False, default=_told_apart)
    for row in rows:
        try:
            text = encoder.encode(row)
        except (TypeError, ValueError, RecursionError):  # keys that JSON has not, rows within themselves
            text = repr(row)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A fingerprint of all that decides how a transformers tokenizer turns messages and text into ids.

    It is the same for a tokenizer loaded from another place. How a batch was padded or cut last does not count.
    """
    said: dict[str, Any] = {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "added": {str(id_): repr(token) for id_, token in tokenizer.added_tokens_decoder.items()},
        "template": tokenizer.chat_template,
    }
    said |= {name: getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
        text = text[max(0, text.find('"added_tokens"')) :]  # truncation and padding stand before it
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
        said["arguments"] = {k: v for k, v in tokenizer.init_kwargs.items() if k not in _PLACES}
        for file in _vocabulary_files(tokenizer):
            text += hashlib.sha256(file.read_bytes()).hexdigest()
    said["vocabulary"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=repr).encode()).hexdigest()


def _vocabulary_files(tokenizer: Any) -> list[Path]:
    """Of a tokenizer in Python: merges and models that its vocabulary alone does not tell."""
    named = [getattr(tokenizer, name, None) for name in sorted(getattr(tokenizer, "vocab_files_names", {}))]
    return [Path(name) for name in named if isinstance(name, str) and Path(name).is_file()]


def _told_apart(value: Any) -> list[str]:
    """What JSON has no form for, so that it does not pass for its own text."""
    return [type(value).__qualname__, repr(value)]


def text_fingerprint(text: str | Mapping[str, str] | None) -> str | None:
    """A fingerprint of a text, such as a chat template, or of several under their names."""
    if text is None:
        return None
    whole = text if isinstance(text, str) else json.dumps(dict(text), sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide the arithmetic."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
