"""Tokens kept for the next run that asks for the same. Knows nothing of how they are made.

An entry is a folder named after all that decides its tokens: the rows' content and order, the tokenizer's content (not
its path), the template, the settings, the versions, and the very code that renders. So nothing ever needs to be
invalidated by hand. It is written aside and renamed when it is complete; it carries the hashes of its files and is
compared with them before it is used; and it is held while it is used, so that no other process removes it to make room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaw import provenance
from deltaw.data.render import RenderSettings
from deltaw.data.tokenfiles import made_at, require_intact
from deltaw.data.tokens import FORMAT, MARKER, TokenDataset
from deltaw.errors import ConfigError, DataError
from deltaw.held import Hold, hold, new_folder, remove_unheld
from deltaw.home import cache_home

__all__ = ["TokenCache", "tokens_fingerprint"]

log = logging.getLogger("deltaw")
LIMIT = "DELTAW_TOKENS_LIMIT"  # environment: the most that the cache may take, in GB
DEFAULT_LIMIT = 10.0
_BUILDING = ".new-"


def tokens_fingerprint(rows: Iterable[Mapping[str, Any]], tokenizer: Any, settings: RenderSettings) -> str:
    """A name for the tokens of these rows: equal exactly where nothing that decides them differs.

    Args:
        rows: read once, one at a time.
    """
    template = settings.chat_template or tokenizer.chat_template
    said = {
        "format": FORMAT,
        "code": _code(),
        "versions": [version("transformers"), version("tokenizers")],
        "tokenizer": provenance.tokenizer_fingerprint(tokenizer),
        "settings": dataclasses.asdict(settings),
        # a template may write the date (Llama 3's does)
        "date": date.today().isoformat() if "strftime_now" in str(template) else None,
        "rows": provenance.rows_fingerprint(rows, keys_in_order=True),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class TokenCache:
    """A folder of token files, each entry under its fingerprint.

    Args:
        folder: when None, ``tokens`` in deltaw's folder on this machine ($DELTAW_HOME, else ~/.cache/deltaw).
        limit: the most bytes it may take: entries that were not used for longest go first. None: $DELTAW_TOKENS_LIMIT,
            in GB, else 10 GB. The entry that was made last, and those in use, stay in any case.

    Raises:
        ConfigError: $DELTAW_TOKENS_LIMIT is no number.
    """

    def __init__(self, folder: str | Path | None = None, limit: float | None = None) -> None:
        self.folder = cache_home() / "tokens" if folder is None else Path(folder).expanduser()
        self.limit = _limit() if limit is None else limit

    def get(self, fingerprint: str) -> TokenDataset | None:
        """The tokens of that name, or None. An entry that is damaged is removed, which is told."""
        entry = self.folder / fingerprint
        held = hold(entry)
        if held is None:
            if entry.is_dir() and remove_unheld(entry):
                log.warning("the cached tokens in %s had lost their files and are made again", entry)
            return None
        try:
            require_intact(entry)
            tokens = TokenDataset.open(entry, held=held)
            if tokens.fingerprint != fingerprint:
                raise DataError(f"{entry} holds the tokens of {tokens.fingerprint or 'something else'}")
            made = made_at(entry)
        except DataError as error:
            held.release()
            remove_unheld(entry)
            log.warning("the cached tokens are damaged and are made again: %s", error)
            return None
        with contextlib.suppress(OSError):  # used now: others go before it
            os.utime(entry / MARKER)
        return dataclasses.replace(tokens, made=made)

    def new_folder(self) -> Hold:
        """A folder to write an entry in, which goes with its hold unless :meth:`keep` is called."""
        return new_folder(self.folder, _BUILDING)

    def keep(self, tokens: TokenDataset) -> TokenDataset:
        """Makes an entry of a data set written to a folder of :meth:`new_folder`, and gives it as it is from now on.

        Where another process was faster with the same, it gives that one's.
        """
        entry = self.folder / tokens.fingerprint
        for _ in range(2):
            try:
                assert tokens.folder is not None
                tokens.folder.rename(entry)
            except OSError:  # it is there already
                other = self.get(tokens.fingerprint)
                if other is not None:
                    return dataclasses.replace(other, made="")
                continue  # that one was damaged, and is removed
            held = hold(entry)
            assert held is not None  # nobody can have removed what is held as `tokens`
            kept = TokenDataset.open(entry, held=held)
            self.trim()
            return kept
        return tokens  # where they were written is as good a place for this run

    def trim(self) -> None:
        """Removes what killed processes left, and the oldest entries beyond the limit."""
        entries: list[tuple[float, int, Path]] = []
        for path in list(self.folder.iterdir()):
            if path.name.startswith("."):
                remove_unheld(path)
                continue
            with contextlib.suppress(OSError):  # just removed by another process
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append(((path / MARKER).stat().st_mtime, size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.limit:
                return
            if remove_unheld(path):
                total -= size
                log.info("removed %s from the cache of tokens: it may take %.3g GB (%s)", path, self.limit / 1e9, LIMIT)


def _limit() -> float:
    said = os.environ.get(LIMIT)
    if not said:
        return DEFAULT_LIMIT * 1e9
    try:
        limit = float(said)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise ConfigError(f"the environment variable {LIMIT} = {said!r} is no size: a number of GB, as in {LIMIT}=10")
    return limit * 1e9


@functools.cache
def _code() -> str:
    """Of the files that turn rows into tokens: an entry made by other code is another entry."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*")):
        if file.suffix in {".py", ".jinja"}:
            digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()
