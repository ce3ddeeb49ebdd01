"""Merging adapters into the base, taking them out again, and measuring what a merge changes.

Works on any module that carries adapters; the arithmetic is the host layer's.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapters import HostLayer, ModulesToSaveWrapper, host_layers
from deltaw.adapters.inject import carriers
from deltaw.errors import MergeError, did_you_mean
from deltaw.modules import dtype_of, name_of, set_submodule, weight_owners
from deltaw.weights import is_finite

__all__ = [
    "MergeReport",
    "Requantization",
    "logits_of",
    "make_hosts_dense",
    "merge_adapters",
    "merge_report",
    "unload",
    "unmerge_adapters",
]

log = logging.getLogger("deltaw")


def merge_adapters(model: nn.Module, names: Sequence[str], *, keep: bool = True, measuring: bool = False) -> None:
    """Folds adapters into the base weights of every layer, all or none.

    Args:
        keep: keep a copy of each base weight, so that unmerging is bitwise.
        measuring: the caller looks at what rounding costs, and takes it back: no warning of it.

    Raises:
        MergeError: unknown or already merged adapters, or a result that is not finite; the base is then
            unchanged.
    """
    names = list(names)
    everywhere = list(host_layers(model))
    _check_names([host for _, host in everywhere], names)
    hosts = [(path, host) for path, host in everywhere if any(name in host.adapters for name in names)]
    if keep and any(host.disable_adapters for _, host in hosts):
        raise MergeError("adapters are disabled now; merge outside disable_adapter(), or enable_adapter_layers() first")
    _check_finite(hosts, names, every_sum=not keep)
    owners = weight_owners(model)
    tied: dict[str, list[str]] = {}
    done: list[HostLayer] = []
    try:
        for path, host in hosts:
            others = _sharers(owners, path, host)
            if others:
                tied[path] = others
                host.own_weight()
            try:
                host.merge(names, keep=keep)
            except MergeError as error:
                for merged in done if keep else []:
                    merged.unmerge(names)
                if not host.merged:
                    host.share_again()
                raise MergeError(f"{path}: {error}") from None
            done.append(host)
    finally:
        _tie_again(hosts)
    owners = weight_owners(model) if tied else {}
    told = Requantization.of(hosts)
    if told is not None and not measuring:
        log.warning("%s; merge_and_unload(dequantize=True) gives plain layers, rounded to their dtype alone", told)
    for path, host in hosts if tied else ():
        left = [other for other in tied.get(path, ()) if other not in owners[host.base_layer.weight]]  # type: ignore[index]
        if left:
            log.warning("%s was tied to %s; merging gave it weights of its own", path, ", ".join(left))


@dataclasses.dataclass(frozen=True)
class Requantization:
    """What merging into a quantized base rounds off: of each layer the Euclidean norm of merged weight minus what the
    base holds then, relative to the merged weight and to the update."""

    layers: int
    mean: float
    worst: float
    worst_layer: str
    #: mean relative to the update; at 1 as much is rounded off as was merged
    of_update: float

    @classmethod
    def of(cls, hosts: Iterable[tuple[str, HostLayer]]) -> Self | None:
        """That of the layers that are merged now; None where none of them is quantized."""
        found = {path: host.rounding for path, host in hosts if host.rounding is not None}
        if not found:
            return None
        relative = {path: r.error / r.weight if r.weight else 0.0 for path, r in found.items()}
        of_update = [r.error / r.update for r in found.values() if r.update]
        worst = max(relative, key=lambda path: relative[path])
        mean = sum(relative.values()) / len(relative)
        return cls(len(found), mean, relative[worst], worst, sum(of_update) / len(of_update) if of_update else math.inf)

    def __str__(self) -> str:
        return (
            f"merged into a quantized base: {self.layers} layers are off by {self.mean:.2%} of their weight on "
            f"average, {self.worst:.2%} at most ({self.worst_layer}), {self.of_update:.2g} times the update itself"
        )


def _tie_again(hosts: Sequence[tuple[str, HostLayer]]) -> None:
    """Layers that shared one weight and hold equal ones now share one again (adapters with ``ensure_weight_tying``)."""
    leaders: dict[nn.Parameter, HostLayer] = {}
    for _, host in hosts:
        if host.shared is None:
            continue
        leader = leaders.setdefault(host.shared, host)
        if leader is not host and torch.equal(leader.weight, host.weight):
            host.base_layer.weight = leader.base_layer.weight


def _check_names(hosts: Sequence[HostLayer], names: list[str]) -> None:
    known = {name for host in hosts for name in host.adapters}
    if not names:
        raise MergeError("no adapter is active, so there is nothing to merge; activate or name one")
    for name in names:
        if name not in known:
            raise MergeError(f"no adapter {name!r} to merge; there are {sorted(known)}{did_you_mean(name, known)}")
    merged = {name for host in hosts for name in host.merged_adapters}
    twice = sorted({name for name in names if name in merged or names.count(name) > 1})
    if twice:
        raise MergeError(
            f"adapters {twice} are merged already or named twice; call unmerge_adapter() before merging again"
        )


def _check_finite(hosts: list[tuple[str, HostLayer]], names: list[str], *, every_sum: bool) -> None:
    """Refuses before the first write: NaN in an adapter and, where no copy is kept to go back to, any bad
    sum."""
    bad = [
        f"{path} ({name})"
        for path, host in hosts
        for name in names
        if name in host.adapters and not all(is_finite(p) for p in host.adapters[name].parameters())
    ]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise MergeError(f"cannot merge: adapter weights are not finite in {shown}; the base was left as it was")
    if every_sum:
        for path, host in hosts:
            try:
                host.merged_tensors([name for name in names if name in host.adapters])
            except MergeError as error:
                raise MergeError(f"{path}: {error}") from None


def _sharers(owners: dict[nn.Parameter, list[str]], path: str, host: HostLayer) -> list[str]:
    """The other places where the weight of ``host``'s base is registered."""
    weight = getattr(host.base_layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or len(owners.get(weight, ())) < 2:
        return []
    return [owner for owner in owners.get(weight, []) if owner != f"{path}.{name_of(host, host.base_layer)}.weight"]


def unmerge_adapters(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Takes adapters (default: all) out of the base weights; with none left the base is bitwise what it was.

    Raises:
        MergeError: no adapter of that name is there.
    """
    hosts = [host for _, host in host_layers(model)]
    known = {name for host in hosts for name in host.adapters}
    for name in names or []:
        if name not in known:
            raise MergeError(f"no adapter {name!r} to unmerge; there are {sorted(known)}{did_you_mean(name, known)}")
    for host in hosts:
        host.unmerge(names)


@torch.no_grad()
def unload(model: nn.Module, names: Sequence[str], *, merge: bool, dequantize: bool = False) -> nn.Module:
    """Removes every adapter from ``model`` and returns it as a plain, frozen model.

    Args:
        names: the active adapters, whose updates stay when ``merge`` (their ``modules_to_save`` too).
        merge: fold the adapters in first; otherwise the base comes back as it was.
        dequantize: leave plain layers in the place of quantized ones, so that a merge rounds to their dtype alone.

    Raises:
        MergeError: nothing to merge, unknown adapters, two that replace the same module, or a result not
            finite.
    """
    whole = {path: w for path, w in carriers(model) if isinstance(w, ModulesToSaveWrapper)}
    if merge:
        for path, wrapper in whole.items():
            if sum(name in wrapper.modules_to_save for name in names) > 1:
                raise MergeError(f"several of {list(names)} replace {path} whole (modules_to_save); merge one of them")
        merged = {name for _, host in host_layers(model) for name in host.merged_adapters}
        unmerge_adapters(model, sorted(merged - set(names)))
        quantized = []
        if dequantize:
            unmerge_adapters(model)  # to be merged again, into plain layers
            merged = set()
            quantized = make_hosts_dense(model)
        left = [name for name in names if name not in merged]
        try:
            if left or not names:
                merge_adapters(model, left, keep=False)
        except MergeError:
            for host, layer in quantized:
                host.base_layer = layer
            raise
    else:
        unmerge_adapters(model)
        for _, host in host_layers(model):
            host.bases.put(host.store, None)
    successors: dict[nn.Parameter, set[nn.Parameter]] = {}  # a base's weight -> what its places hold instead
    for path, host in host_layers(model):
        if host.shared is not None:
            successors.setdefault(host.shared, set()).add(host.base_layer.weight)  # type: ignore[arg-type]
        set_submodule(model, path, host.base_layer)
    for path, wrapper in whole.items():
        copy = next((wrapper.modules_to_save[n] for n in names if n in wrapper.modules_to_save), None)
        if not merge or copy is None:
            set_submodule(model, path, wrapper.original_module)
            continue
        set_submodule(model, path, copy.to(dtype_of(wrapper.original_module)))
        for key, original in wrapper.original_module.named_parameters():
            successors.setdefault(original, set()).add(copy.get_parameter(key))
    owners = weight_owners(model)
    parted = {original for original, now in successors.items() if original in owners or len(now) > 1}
    for path, wrapper in whole.items():
        if not parted.isdisjoint(wrapper.original_module.parameters()):
            log.warning("%s was tied to other weights; its trained copy is now on its own", path)
    if parted:
        _mark_untied(model)
    if dequantize:
        from deltaw.quant.dequantize import dequantize_

        dequantize_(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def make_hosts_dense(model: nn.Module) -> list[tuple[HostLayer, nn.Module]]:
    """Puts plain layers of the values that they are read as under the adapters of quantized layers.

    Returns:
        (host, its quantized layer), to put them back.
    """
    from deltaw.quant.dequantize import dense_linear  # loads more than a merge into a dense base needs

    quantized = [(host, host.base_layer) for _, host in host_layers(model) if host.store.quantized]
    for host, layer in quantized:
        host.base_layer = dense_linear(layer)
    return quantized


def _mark_untied(model: nn.Module) -> None:
    """Otherwise the saved model would be tied again when it is loaded."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """How far the merged model's logits are from those of the base with its adapter beside it."""

    tokens: int
    max_abs: float
    mean_abs: float
    #: largest and mean size of the adapter model's own logits, to judge the difference by
    scale: float
    #: share of positions whose most likely token is the same
    same_argmax: float
    #: mean KL(adapter || merged) in nats a token
    kl: float

    @classmethod
    def between(cls, apart: Tensor, merged: Tensor) -> Self:
        """Compares logits (tokens, vocabulary) of the adapter beside its base with those of the merged
        model."""
        a, b = apart.float(), merged.float()
        gap = (a - b).abs()
        kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="batchmean")
        return cls(
            tokens=a.shape[0],
            max_abs=gap.max().item(),
            mean_abs=gap.mean().item(),
            scale=a.abs().mean().item(),
            same_argmax=(a.argmax(-1) == b.argmax(-1)).float().mean().item(),
            kl=max(0.0, kl.item()),
        )

    def __str__(self) -> str:
        return (
            f"merged against adapter over {self.tokens:,} tokens: "
            f"logits differ by {self.mean_abs:.2e} on average, {self.max_abs:.2e} at most "
            f"(logits are {self.scale:.1f} on average); same top token at "
            f"{self.same_argmax:.2%}; KL {self.kl:.2e} nats a token"
        )


@torch.no_grad()
def merge_report(model: Any, batches: Sequence[dict[str, Tensor]]) -> MergeReport:
    """Merges the active adapters, compares logits on ``batches``, and unmerges again (bitwise).

    Args:
        model: a PeftModel of a causal language model.
        batches: keyword arguments of forward, e.g. ``{"input_ids": ..., "attention_mask": ...}`` with (b, t)
            tensors.

    Raises:
        MergeError: the adapters are merged already.
    """
    if any(host.merged for _, host in host_layers(model)):
        raise MergeError("merge_report compares before and after: call unmerge_adapter() first")
    apart = logits_of(model, batches)
    merge_adapters(model, list(model.active_adapters), measuring=True)
    try:
        return MergeReport.between(apart, logits_of(model, batches))
    finally:
        unmerge_adapters(model)


@torch.no_grad()
def logits_of(model: Any, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """The logits (tokens, vocabulary) of a model in evaluation mode, where the attention mask is not zero."""
    training = model.training
    model.eval()
    pieces = []
    try:
        for batch in batches:
            logits, mask = model(**batch).logits.float(), batch.get("attention_mask")
            pieces.append(logits.flatten(0, -2) if mask is None else logits[mask.bool().to(logits.device)])
    finally:
        model.train(training)
    return torch.cat(pieces)
