"""Which layers ``trainable_token_indices`` means, and putting their rows there.

Everything that cannot be is collected and reported in one error, before the model is touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.saved import ModulesToSaveWrapper
from deltaw.adapters.tokens import FollowedRows, FollowingHost, TokenHost, TokenRows
from deltaw.errors import TargetError, did_you_mean
from deltaw.modules import matches, name_of, set_submodule, split_name
from deltaw.weights import has_store, store_of

__all__ = ["TokenTargets", "place_tokens", "token_targets"]


@dataclasses.dataclass
class TokenTargets:
    """Layers whose rows train, and layers that follow one of these (path -> path of the leader)."""

    leading: list[str] = dataclasses.field(default_factory=list)
    following: dict[str, str] = dataclasses.field(default_factory=dict)


def token_targets(model: nn.Module, config: Any, taken: Mapping[str, str]) -> TokenTargets:
    """Finds the layers that ``config.trainable_token_indices`` names, and those that share their weight.

    Args:
        taken: path -> the field of the same config that has a claim on that module already.

    Raises:
        TargetError: a layer that is not there, cannot be replaced by rows or is taken; rows outside of its weight or
            named twice. All faults at once.
    """
    wanted = getattr(config, "trainable_token_indices", None)
    if wanted is None:
        return TokenTargets()
    places = dict(_places(model))
    main = _input_embedding(model)
    asked = wanted if isinstance(wanted, dict) else {main or "embed_tokens": wanted}
    faults: list[str] = []
    found: dict[str, list[int]] = {}
    for key, rows in asked.items():
        paths = [path for path in places if matches(path, [key])]
        if not paths:
            known = {split_name(path)[1] for path, module in places.items() if isinstance(module, nn.Embedding)}
            faults.append(f"{key!r} is no layer of {type(model).__name__}{did_you_mean(key, known) or _listing(known)}")
        for path in paths:
            faults += [f"{path!r} is named twice"] if path in found else _faults(path, places[path], rows, taken)
            found.setdefault(path, rows)
    # a head that is named alone leaves the embedding as it is, as in PEFT
    leader = main if main is not None else next(iter(found), "")
    tied = _sharing(places, leader) if leader in found else []
    following = {}
    for path in tied:
        module = places[path]
        if path in found and sorted(found[path]) != sorted(found[leader]):
            if getattr(config, "ensure_weight_tying", False):
                faults.append(f"{path!r} is tied to {leader!r}, but other rows are given for it (ensure_weight_tying)")
        elif path in taken:
            faults.append(f"{path!r} is tied to {leader!r} and follows its rows, but {taken[path]} names it too")
        elif isinstance(module, (HostLayer, ModulesToSaveWrapper)) and not isinstance(module, FollowingHost):
            faults.append(f"{path!r} is tied to {leader!r} and follows its rows, but it is adapted already")
        else:
            following[path] = leader
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in dict.fromkeys(faults))
        raise TargetError(f"trainable_token_indices:\n{lines}")
    return TokenTargets([path for path in found if path not in following], following)


def _input_embedding(model: nn.Module) -> str | None:
    """The path of the model's input embedding, where it says which that is."""
    try:
        return name_of(model, model.get_input_embeddings())  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _places(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module outside of those that carry adapters, a layer in two places twice."""
    for key, child in model._modules.items():
        if child is not None:
            path = f"{prefix}.{key}" if prefix else key
            yield path, child
            if not isinstance(child, (HostLayer, ModulesToSaveWrapper)):
                yield from _places(child, path)


def _faults(path: str, module: nn.Module, rows: list[int], taken: Mapping[str, str]) -> list[str]:
    """What is wrong with replacing ``rows`` of ``module``, in words."""
    claim = next((field for other, field in taken.items() if f"{path}.".startswith(f"{other}.")), None)
    if claim:
        return [f"{path!r} is named by {claim} too; train it one way"]
    if isinstance(module, FollowingHost):
        return [f"{path!r} follows the rows of the embedding that it is tied to; name that one"]
    if isinstance(module, (HostLayer, ModulesToSaveWrapper)) and not isinstance(module, TokenHost):
        return [f"{path!r} is adapted already, and only a plain layer can have rows replaced"]
    layer = module.base_layer if isinstance(module, TokenHost) else module
    if not isinstance(layer, (nn.Embedding, nn.Linear)) or not has_store(layer):
        return [f"{path!r} is a {type(layer).__name__}; only rows of an embedding or of an output head can be replaced"]
    reason = TokenHost.unfit(layer)
    if reason:
        return [f"{path!r} ({type(layer).__name__}) cannot have rows replaced: {reason}"]
    faults, size = [], store_of(layer).shape[0]
    if not rows:
        faults.append(f"no row of {path!r} is named; leave trainable_token_indices out instead")
    outside = sorted({row for row in rows if not 0 <= row < size})
    if outside:
        faults.append(f"{path!r} has rows 0 to {size - 1}, and {_some(outside)} are not among them")
    twice = sorted({row for row in rows if rows.count(row) > 1})
    if twice:
        faults.append(f"rows {_some(twice)} of {path!r} are named twice")
    return faults


def _sharing(places: dict[str, nn.Module], leader: str) -> list[str]:
    """Paths of the other layers whose weight is that of ``leader``."""
    weight = _weight(places[leader])
    return [path for path, module in places.items() if path != leader and _weight(module) is weight]


def _weight(module: nn.Module) -> Any:
    """The parameter ``weight`` of a module, or of the one that it wraps; the module itself where there is none."""
    if isinstance(module, (HostLayer, ModulesToSaveWrapper)):
        module = module.base_layer if isinstance(module, HostLayer) else module.original_module
    return module._parameters.get("weight") if module._parameters.get("weight") is not None else module


def _listing(known: set[str]) -> str:
    return f"; its embeddings are {', '.join(sorted(known))}" if known else "; it has no embedding"


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:10])) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")


def place_tokens(model: nn.Module, targets: TokenTargets, name: str, config: PeftConfig) -> None:
    """Puts adapter ``name``'s rows on the layers of ``targets``."""
    for path in targets.leading:
        host = model.get_submodule(path)
        if not isinstance(host, TokenHost):
            host = _wrapped(model, path, TokenHost(host))
        host.add(TokenRows, name, config, path)
    for path, leader in targets.following.items():
        host = model.get_submodule(path)
        if not isinstance(host, FollowingHost):
            lead = model.get_submodule(leader)
            assert isinstance(lead, TokenHost)
            host = _wrapped(model, path, FollowingHost(host, lead))
        host.add(FollowedRows, name, config, path)


def _wrapped(model: nn.Module, path: str, host: TokenHost) -> TokenHost:
    host.train(host.base_layer.training)
    set_submodule(model, path, host)
    return host
