"""Which layers a config means: ``target_modules`` and its companions, resolved against a model.

Everything that matches nothing is collected and reported in one error, with the nearest names. Of a
method it knows only which kinds of layer it supports.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

from torch import nn

from deltaw.adapters.host import HostLayer
from deltaw.adapters.hosts import host_type
from deltaw.adapters.registry import adapters_of, tied_adapters_of
from deltaw.adapters.saved import ModulesToSaveWrapper
from deltaw.adapters.tying import Ties, find_ties
from deltaw.errors import TargetError, did_you_mean
from deltaw.modules import layer_index, matches, split_name
from deltaw.weights import TransposedStore, store_of

__all__ = ["CUSTOMARY_TARGETS", "Targets", "resolve"]

log = logging.getLogger("deltaw")

ALL_LINEAR = "all-linear"
CLASSIFIER_HEADS = ("score", "classifier", "qa_outputs")
#: task_type -> heads that start random in a fresh model, so that they must train along with the adapter (as
#: in PEFT)
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
MOST_FAULTS = 20  # lines of an error; a wrong expression can match hundreds of layers

#: model_type -> the layers adapted when target_modules is not given: names, or a regular expression (PEFT's choices)
CUSTOMARY_TARGETS: dict[str, list[str] | str] = {
    model_type: targets
    for model_types, targets in (
        ("bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm", ["q_proj", "v_proj"]),
        ("gemma gemma2 gemma3_text qwen2 qwen3", ["q_proj", "v_proj"]),
        ("gemma4", r".*language_model\..*\.(q_proj|v_proj)"),
        ("bloom gpt_neox falcon RefinedWeb RefinedWebModel chatglm", ["query_key_value"]),
        ("bert roberta xlm-roberta electra layoutlm", ["query", "value"]),
        ("deberta", ["in_proj"]),
        ("deberta-v2", ["query_proj", "value_proj"]),
        ("t5 mt5", ["q", "v"]),
        ("blip-2", ["q", "v", "q_proj", "v_proj"]),
        ("gpt2 gpt_bigcode", ["c_attn"]),
        ("btlm", ["c_proj", "c_attn"]),
        ("codegen", ["qkv_proj"]),
        ("mpt", ["Wqkv"]),
        ("phi", ["q_proj", "v_proj", "fc1", "fc2"]),
        ("nemotron_h", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("rwkv", ["key", "value", "receptance", "output"]),
        ("rwkv7", ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"]),
    )
    for model_type in model_types.split()
}


@dataclasses.dataclass
class Targets:
    """The outcome: which modules get an adapter, and which are trained whole."""

    adapted: dict[str, nn.Module]
    saved: dict[str, nn.Module]
    #: what matched nothing, in words; an error unless the config came from a file
    notes: list[str]
    #: layer -> the layer before it in ``adapted`` or ``saved`` whose parameters it shares (``ensure_weight_tying``)
    tied: dict[str, str] = dataclasses.field(default_factory=dict)


def resolve(model: nn.Module, config: Any, *, strict: bool = True) -> Targets:
    """Finds the modules that ``config`` names, and writes the resolved ``target_modules`` and what follows from the
    layers found back into it.

    Args:
        strict: an entry or pattern that matches nothing is an error; otherwise a note (PEFT writes such
            configs).

    Raises:
        TargetError: nothing matches, a match cannot carry an adapter, or (strict) something is left
            unmatched.
    """
    kind = type(model).__name__
    candidates = _candidates(model)
    customary = config.target_modules is None
    if customary:
        config.target_modules = _customary(model, kind, {**CUSTOMARY_TARGETS, **config.customary})
    _train_heads(config, candidates)
    ties = find_ties(model, config, candidates)
    spec = config.target_modules
    faults: list[str] = []
    notes: list[str] = [ties.note] if ties.note else []

    saved = _saved(candidates, config.modules_to_save or [])
    saved.update({name: candidates[name] for name in ties.saved})
    barred = (*saved, *ties.adapted)
    if isinstance(spec, str) and spec.lower() == ALL_LINEAR:
        adapted = _all_linear(model, candidates, config)
        adapted = {name: m for name, m in adapted.items() if not _excluded(name, config, barred)}
        adapted = _only_layers(adapted, config)
        if adapted:
            config.target_modules = _shortest_names(adapted, candidates)
    else:
        named = {name: m for name, m in candidates.items() if matches(name, spec)}
        wanted = {name: m for name, m in named.items() if not _excluded(name, config, barred)}
        adapted = _only_layers(wanted, config)
        if not isinstance(spec, str) and not customary:  # some customary names are of one kind of a model only
            lost = [entry for entry in sorted(spec) if not any(matches(name, [entry]) for name in named)]
            adaptable = {split_name(name)[1] for name, m in candidates.items() if host_type(m)}
            for entry in lost:
                notes.append(
                    f"target_modules entry {entry!r} matches no layer of {kind}"
                    f"{did_you_mean(entry, adaptable) or _listing(adaptable)}"
                )
    for name, module in saved.items():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            faults.append(
                f"modules_to_save matches {name!r}, a {type(module).__name__}, which is never called; name its items"
            )
        if any(isinstance(inner, HostLayer) for inner in module.modules()):
            faults.append(f"modules_to_save matches {name!r}, which carries an adapter already; delete that one first")
    if adapted:
        adapted.update({name: candidates[name] for name in ties.adapted})
        if ties.source not in {"", *adapted, *saved}:
            faults.append(f"ensure_weight_tying needs {ties.source!r}, which the config leaves out")
    faults += _unfit(model, config, adapted, ties)

    if not adapted:
        everything = {split_name(name)[1] for name, m in candidates.items() if host_type(m)}
        shown = sorted(spec) if not isinstance(spec, str) else spec
        guesses = "" if isinstance(spec, str) else "".join(did_you_mean(entry, everything) for entry in sorted(spec))
        faults.append(
            f"target_modules {shown!r}{_narrowing(config)} match no layer of {kind}{guesses or _listing(everything)}"
        )
    else:
        notes += _unmatched_companions(config, candidates, adapted, saved, kind)
    if strict or not adapted:
        faults += notes
    if faults:
        lines = [f"  - {fault}" for fault in dict.fromkeys(faults)]
        if len(lines) > MOST_FAULTS:
            lines[MOST_FAULTS:] = [f"  ... and {len(lines) - MOST_FAULTS} more"]
        raise TargetError("cannot place the adapter:\n" + "\n".join(lines))
    for note in notes:
        log.warning("%s", note)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(isinstance(store_of(_base_of(m)), TransposedStore) for m in adapted.values())
    return Targets(adapted, saved, notes, dict.fromkeys((*ties.adapted, *ties.saved), ties.source))


def _base_of(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, HostLayer) else module


def _unfit(model: nn.Module, config: Any, adapted: dict[str, nn.Module], ties: Ties) -> list[str]:
    """Words on each layer that cannot carry an adapter of this method."""
    faults = []
    places: dict[int, str] = {}
    adapters, tied = adapters_of(config), tied_adapters_of(config)
    for name, module in adapted.items():
        words = f"target_modules matches {name!r}, a {type(_base_of(module)).__name__}, "
        if places.setdefault(id(module), name) != name:
            faults.append(f"target_modules matches {name!r}, which is the same layer as {places[id(module)]!r}")
        host = host_type(module)
        if host is None:
            faults.append(words + "which cannot carry an adapter")
        elif not host.of_method:
            faults.append(words + "whose rows another adapter replaces (trainable_token_indices); delete it first")
        elif name in ties.adapted and host.kind not in tied:
            faults.append(f"ensure_weight_tying: {config.method} cannot tie {name!r} to {ties.source!r}")
        elif host.kind not in adapters:
            faults.append(words + f"which {config.method} does not support; it adapts {', '.join(adapters)} layers")
        elif unfit := host.unfit(_base_of(module)):
            faults.append(words + f"which cannot carry an adapter: {unfit}")
        elif isinstance(model.get_submodule(split_name(name)[0]), nn.MultiheadAttention):
            # it reads the weight of its projection and never calls it: an adapter there would do nothing
            faults.append(
                f"target_modules matches {name!r} inside nn.MultiheadAttention, which never calls it; "
                "leave it out with exclude_modules"
            )
    return faults


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module an adapter could be asked for: those inside hosts and saved copies are left out."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for key, child in module._modules.items():  # named_children() would hide a layer's second place
            if child is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            found[name] = child
            if not isinstance(child, (HostLayer, ModulesToSaveWrapper)):
                walk(child, name)

    walk(model, "")
    return found


def _customary(model: nn.Module, kind: str, choices: dict[str, list[str] | str]) -> set[str] | str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in choices:
        raise TargetError(
            f"target_modules is not set, and there is no customary choice for {kind} "
            f"(model_type {model_type!r}); set it to a list of layer names or to 'all-linear'"
        )
    targets = choices[model_type]
    return targets if isinstance(targets, str) else set(targets)


def _train_heads(config: Any, candidates: dict[str, nn.Module]) -> None:
    """Adds the task's head to ``modules_to_save``: frozen at random values it would make training
    pointless."""
    present = {split_name(name)[1] for name in candidates}
    listed = config.modules_to_save or []
    heads = [h for h in TASK_HEADS.get(str(config.task_type), ()) if h in present and h not in listed]
    if heads:
        config.modules_to_save = [*listed, *heads]


def _saved(candidates: dict[str, nn.Module], entries: list[str]) -> dict[str, nn.Module]:
    """Modules to train whole: the outermost ones whose name ends in an entry, also in the middle of a word,
    as in PEFT."""
    found = {name: m for name, m in candidates.items() if any(name.endswith(entry) for entry in entries)}
    stray = {split_name(name)[1] for name in found if not matches(name, entries)}
    if stray:
        log.warning("modules_to_save %s means %s too (names that end so)", entries, ", ".join(sorted(stray)))
    return {name: m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)}


def _all_linear(model: nn.Module, candidates: dict[str, nn.Module], config: Any) -> dict[str, nn.Module]:
    """Every linear layer but the output head (of language models) or the classifier (of classification
    models)."""
    heads: list[nn.Module] = []
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is not None:
            heads.append(head)
        elif config.task_type == "SEQ_CLS":
            heads += [getattr(model, name) for name in CLASSIFIER_HEADS if hasattr(model, name)][:1]
    fused = sorted({name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name})
    if fused:
        log.warning("all-linear leaves out %d fused expert weights (%s, ...)", len(fused), fused[0])
    return {
        name: module
        for name, module in candidates.items()
        if _is_linear(module) and not any(module is head for head in heads)
    }


def _is_linear(module: nn.Module) -> bool:
    host = host_type(module)
    return host is not None and host.kind == "linear"


def _excluded(name: str, config: Any, barred: tuple[str, ...]) -> bool:
    if any(name == prefix or name.startswith(f"{prefix}.") for prefix in barred):
        return True  # trained whole: an adapter on top would train the same thing twice
    return bool(config.exclude_modules) and matches(name, config.exclude_modules)


def _only_layers(found: dict[str, nn.Module], config: Any) -> dict[str, nn.Module]:
    indices = _indices(config)
    if not indices:
        return found
    return {name: m for name, m in found.items() if layer_index(name, config.layers_pattern) in indices}


def _indices(config: Any) -> list[int]:
    chosen = config.layers_to_transform
    return [] if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen)


def _narrowing(config: Any) -> str:
    parts = [
        f"{field}={getattr(config, field)!r}"
        for field in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if getattr(config, field)
    ]
    return f" (with {', '.join(parts)})" if parts else ""


def _listing(names: set[str]) -> str:
    return f"; its layers are {', '.join(sorted(names)[:12])}" if names else "; it has no layer that can be adapted"


def _unmatched_companions(
    config: Any,
    candidates: dict[str, nn.Module],
    adapted: dict[str, nn.Module],
    saved: dict[str, nn.Module],
    kind: str,
) -> list[str]:
    """Words on patterns, layer numbers and modules_to_save that matched nothing."""
    notes = []
    ends = {split_name(name)[1] for name in adapted}
    for field in config.patterns:
        for key in getattr(config, field) or {}:
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in adapted):
                notes.append(f"{field} key {key!r} matches no adapted layer{did_you_mean(key, ends) or _listing(ends)}")
    for entry in config.modules_to_save or []:
        if entry in TASK_HEADS.get(str(config.task_type), ()) and saved:
            continue  # PEFT lists every name that such a head goes by
        if not any(name.endswith(entry) for name in candidates):
            known = {split_name(name)[1] for name in candidates}
            notes.append(f"modules_to_save entry {entry!r} matches no module of {kind}{did_you_mean(entry, known)}")
    there = {layer_index(name, config.layers_pattern) for name in candidates}
    for index in _indices(config):
        if index not in there:
            top = max((i for i in there if i is not None), default=None)
            notes.append(f"layers_to_transform {index} is not a layer of {kind} (its layers are 0 to {top})")
    excluded = config.exclude_modules
    if excluded and not any(matches(name, excluded) for name in candidates):
        notes.append(f"exclude_modules {excluded!r} matches no module of {kind}")
    return notes


def _shortest_names(adapted: dict[str, nn.Module], candidates: dict[str, nn.Module]) -> set[str]:
    """The last parts of the names when they mean exactly these layers, else the full names."""
    ends = {split_name(name)[1] for name in adapted}
    return ends if {n for n in candidates if matches(n, ends)} == set(adapted) else set(adapted)
