"""``add_weighted_adapter``: what it can combine, the new adapter's config, and filling it.

What trains whole (``modules_to_save``, token rows) is taken over from the one adapter that has it. The arithmetic is
``combine``'s.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from deltaw.adapters.combine import COMBINATIONS, MAJORITIES, Request, Source
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import adapters_named, host_layers
from deltaw.adapters.inject import check_name
from deltaw.adapters.methods.init import decomposition
from deltaw.adapters.methods.lora import LoraConfig
from deltaw.adapters.saved import ModulesToSaveWrapper
from deltaw.adapters.targets import resolve
from deltaw.adapters.tokens import TokenHost
from deltaw.errors import AdapterError, TargetError, did_you_mean
from deltaw.weights import is_finite

__all__ = ["combined_config", "fill_combined"]

SVD_DRIVERS = ("gesvd", "gesvdj", "gesvda")
MOST_FAULTS = 20

Layers = dict[str, list[Source]]


# --- what is asked for, and whether it can be done ----------------------------------------------------------------


def combined_config(model: nn.Module, configs: Mapping[str, PeftConfig], request: Request) -> LoraConfig:
    """The config of the new adapter: the first source's, with the rank and the layers of the combination.

    Raises:
        AdapterError: all that is wrong with the request, at once.
    """
    faults = _wrong_arguments(model, configs, request)
    if not faults:
        faults = _wrong_configs(configs, request) or _wrong_layers(model, request)
    if faults:
        lines = [f"  - {fault}" for fault in faults]
        if len(lines) > MOST_FAULTS:
            lines[MOST_FAULTS:] = [f"  ... and {len(lines) - MOST_FAULTS} more"]
        raise AdapterError(f"add_weighted_adapter cannot combine {list(request.adapters)}:\n" + "\n".join(lines))
    sources: list[Any] = [configs[name] for name in request.adapters]
    layers = _layers(model, request)
    rank = _new_rank(sources, layers, request)
    first = sources[0]
    config = dataclasses.replace(
        copy.deepcopy(first),
        r=rank,
        lora_alpha=rank,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,  # the sources' scalings are in the factors, so the new one's is 1
        # a start in the base's weight would be taken off the combination
        init_lora_weights=first.init_lora_weights if decomposition(first.init_lora_weights) is None else True,
        modules_to_save=list(dict.fromkeys(e for c in sources for e in c.modules_to_save or [])) or None,
        trainable_token_indices=next((c.trainable_token_indices for c in sources if c.trainable_token_indices), None),
    )
    joined = _joined_targets(sources)
    if joined is not None:
        config.target_modules = joined
        if _matched(model, config) == layers.keys():
            return config
    # the first source's own narrowing would lose layers of the others: name them one by one
    return dataclasses.replace(
        config, target_modules=set(layers), layers_to_transform=None, layers_pattern=None, exclude_modules=None
    )


def _wrong_arguments(model: nn.Module, configs: Mapping[str, PeftConfig], request: Request) -> list[str]:
    names, weights, new = list(request.adapters), list(request.weights), request.adapter_name
    faults = [
        f"no adapter {name!r}; there are {list(configs)}{did_you_mean(str(name), configs)}"
        for name in names
        if name not in configs
    ]
    if not names:
        faults.append("no adapters are named")
    twice = sorted({name for name in names if names.count(name) > 1})
    faults += [f"adapter {name!r} is named twice; add up its weights" for name in twice]
    if new in configs:
        faults.append(f"adapter {new!r} exists already; delete it or use another name")
    else:
        try:
            check_name(new)
        except AdapterError as error:
            faults.append(str(error))
    own = sorted({name for _, host in host_layers(model) for name in names if name in host.bases})
    if own:
        faults.append(
            f"adapters {own} were made over base weights of their own (init_lora_weights): they fit no other base"
        )
    if len(weights) != len(names):
        faults.append(f"there are {len(names)} adapters, but {len(weights)} weights")
    faults += [f"weight {weight!r}: a finite number is needed" for weight in weights if not _is_number(weight)]
    kind, density, clamp = request.combination_type, request.density, request.svd_clamp
    if kind not in COMBINATIONS:
        faults.append(
            f"combination_type={kind!r}: use one of {', '.join(COMBINATIONS)}{did_you_mean(str(kind), COMBINATIONS)}"
        )
    elif request.combination.prunes and not (_is_number(density) and 0 < density <= 1):
        faults.append(f"density={density!r}: {kind} needs the share of elements to keep, in (0, 1]")
    if request.majority_sign_method not in MAJORITIES:
        faults.append(
            f"majority_sign_method={request.majority_sign_method!r}: use {' or '.join(map(repr, MAJORITIES))}"
            f"{did_you_mean(str(request.majority_sign_method), MAJORITIES)}"
        )
    if request.svd_rank is not None and (not isinstance(request.svd_rank, int) or request.svd_rank <= 0):
        faults.append(f"svd_rank={request.svd_rank!r}: a positive integer is needed")
    if clamp is not None and not (_is_number(clamp) and 0 <= clamp <= 1):
        faults.append(f"svd_clamp={clamp!r}: a quantile in [0, 1] is needed")
    if request.svd_driver is not None:
        if request.svd_driver not in SVD_DRIVERS:
            faults.append(f"svd_driver={request.svd_driver!r}: use one of {', '.join(SVD_DRIVERS)}, or None")
        device = next((p.device.type for p in model.parameters()), "cpu")
        if device != "cuda":
            faults.append(f"svd_driver={request.svd_driver!r} is for CUDA, and the model is on {device}; leave it out")
    return faults


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong_configs(configs: Mapping[str, PeftConfig], request: Request) -> list[str]:
    faults = []
    sources: dict[str, Any] = {name: configs[name] for name in request.adapters}
    for name, config in sources.items():
        if config.method != "LORA":
            faults.append(f"adapter {name!r} is {config.method}; only plain LoRA updates are combined this way")
            continue
        if config.bias != "none":
            faults.append(f"adapter {name!r} trains the base's own biases (bias={config.bias!r}), which have no weight")
        if config.lora_bias:
            faults.append(f"adapter {name!r} has biases of its own (lora_bias), which are not combined")
    if not faults and len({config.ensure_weight_tying for config in sources.values()}) > 1:
        faults.append("ensure_weight_tying is set for some of the adapters only")
    return faults


def _wrong_layers(model: nn.Module, request: Request) -> list[str]:
    faults = []
    for path, carrier in model.named_modules():
        field, held = _whole(carrier)
        both = [name for name in request.adapters if name in held]
        if len(both) > 1:
            faults.append(f"adapters {both} each train {path!r} ({field}), and whole values cannot be combined")
    how = request.combination
    for path, sources in _layers(model, request).items():
        ranks = {source.adapter.name: source.A.shape[0] for source in sources}
        if not how.stacks and not how.decomposes and len(set(ranks.values())) > 1:
            faults.append(
                f"{request.combination_type} needs equal ranks, and those of {path!r} are {ranks}; use cat or svd"
            )
        if how.decomposes and sources[0].groups > 1:
            faults.append(f"{path!r} is a convolution with groups, whose update has no weight to decompose; use cat")
    return faults


def _whole(carrier: nn.Module) -> tuple[str, Any]:
    """(the config's field, what is held by adapter name) of a module that holds whole values."""
    if isinstance(carrier, ModulesToSaveWrapper):
        return "modules_to_save", carrier.modules_to_save
    return "trainable_token_indices", carrier.trainable_tokens_delta if isinstance(carrier, TokenHost) else {}


def _layers(model: nn.Module, request: Request) -> Layers:
    """Layer name -> those of the adapters that are on it; layers that share another's factors are left out."""
    found: Layers = {}
    for path, host in host_layers(model):
        held = [
            Source.of(host.adapters[name], weight)
            for name, weight in zip(request.adapters, request.weights, strict=True)
            if name in host.adapters and not isinstance(host, TokenHost)
        ]
        if any(True for source in held for _ in source.adapter.parameters()):
            found[path] = held
    return found


def _new_rank(configs: Sequence[Any], layers: Layers, request: Request) -> int:
    named = [max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r for config in configs]
    held = [[source.A.shape[0] for source in sources] for sources in layers.values()]
    if request.combination.stacks:
        return max(sum(named), *map(sum, held))
    largest = max(*named, *map(max, held))
    return (request.svd_rank or largest) if request.combination.decomposes else largest


def _joined_targets(configs: Sequence[Any]) -> Any:
    """The union of what the sources target; None where some are lists and some expressions."""
    targets = [config.target_modules for config in configs]
    if all(isinstance(target, str) for target in targets):
        return "|".join(f"({target})" for target in targets)
    return None if any(isinstance(target, str) for target in targets) else set().union(*targets)


def _matched(model: nn.Module, config: LoraConfig) -> set[str]:
    """The layers that ``config`` would adapt, without those that share another's factors."""
    try:
        targets = resolve(model, copy.deepcopy(config))
    except TargetError:
        return set()
    return set(targets.adapted) - set(targets.tied)


# --- doing it -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill_combined(model: nn.Module, request: Request) -> None:
    """Fills the new adapter, which was made from :func:`combined_config`.

    Raises:
        AdapterError: the combination is not finite.
    """
    targets = adapters_named(model, request.adapter_name)
    for path, sources in _layers(model, request).items():
        new_A, new_B = targets[path].parameters()  # (R, in), (out, R)
        A, B = request.combination.level(sources, new_A.shape[0], request)  # (r, in), (out, r)
        if not (is_finite(A) and is_finite(B)):
            raise AdapterError(f"the combination is not finite on {path!r}; look for NaN in {list(request.adapters)}")
        groups, r = sources[0].groups, B.shape[1]
        new_A.zero_().unflatten(0, (groups, -1))[:, :r] = A.unflatten(0, (groups, -1))
        new_B.zero_()[:, :r] = B
    for carrier in model.modules():
        held = _whole(carrier)[1]
        donor = next((held[name] for name in request.adapters if name in held), None)
        if donor is None or request.adapter_name not in held:
            continue
        mine = held[request.adapter_name]
        for own, value in zip(_tensors(mine), _tensors(donor), strict=True):
            own.copy_(value)


def _tensors(held: nn.Module | nn.Parameter) -> list[torch.Tensor]:
    return [held] if isinstance(held, nn.Parameter) else [*held.parameters(), *held.buffers()]
