"""``ensure_weight_tying``: what trains on the input embedding trains on the layers whose weight is the same one.

Rewrites a config that names any of them so that it names the embedding, as PEFT does, and says which layers follow.
Knows nothing of methods.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from deltaw.modules import matches, name_of, tied_to_embedding

__all__ = ["Ties", "find_ties"]


@dataclasses.dataclass
class Ties:
    """Which layers follow the input embedding.

    Attributes:
        source: name of the embedding.
        adapted: layers that share the parameters of the adapter on it.
        saved: layers that share its trained copy (``modules_to_save``).
        note: what is wrong with asking for it, in words; or empty.
    """

    source: str = ""
    adapted: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    note: str = ""


def find_ties(model: nn.Module, config: Any, candidates: Mapping[str, nn.Module]) -> Ties:
    """The ties that ``config`` asks for; its ``modules_to_save`` or ``target_modules`` then name the embedding alone.

    Args:
        candidates: name -> module, of all that an adapter could be asked for.
    """
    if not getattr(config, "ensure_weight_tying", False):
        return Ties()
    owners = tied_to_embedding(model)
    if not owners:
        return Ties(note=f"ensure_weight_tying: no layer of {type(model).__name__} is tied to its input embedding")
    source = name_of(model, model.get_input_embeddings()) or ""  # type: ignore[operator]
    holders = {owner: [n for n in candidates if owner.startswith(f"{n}.")] for owner in owners}
    followers = tuple(max(names, key=len) for names in holders.values() if names)
    saved, spec = config.modules_to_save or [], config.target_modules
    if any(name.endswith(entry) for entry in saved for name in (source, *followers)):
        kept = [entry for entry in saved if not _only_means(entry, followers, candidates, str.endswith)]
        found = any(source.endswith(entry) for entry in kept)
        config.modules_to_save = kept if found else [*kept, source]
        return Ties(source, saved=followers)
    if any(matches(name, spec or ()) for name in (source, *followers)):
        if not isinstance(spec, str):
            kept = {entry for entry in spec if not _only_means(entry, followers, candidates, _matches_one)}
            config.target_modules = kept if matches(source, kept) else {*kept, source}
        elif not matches(source, spec):
            config.target_modules = rf"(?:{spec}|^{re.escape(source)}$)"
        return Ties(source, adapted=followers)
    if getattr(config, "trainable_token_indices", None):
        return Ties()  # rows of the embedding, which have a tie of their own
    both = ", ".join(repr(name) for name in (source, *followers))
    return Ties(note=f"ensure_weight_tying: neither target_modules nor modules_to_save names one of {both}")


def _matches_one(name: str, entry: str) -> bool:
    return matches(name, [entry])


def _only_means(entry: str, followers: tuple[str, ...], candidates: Mapping[str, nn.Module], rule: Any) -> bool:
    """Whether ``entry`` names followers and nothing else."""
    meant = {name for name in candidates if rule(name, entry)}
    return bool(meant) and meant <= set(followers)
