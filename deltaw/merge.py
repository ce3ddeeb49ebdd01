"""Merging adapters into the base, taking them out again, and measuring what a merge changes.

Works on any module that carries adapters; the arithmetic is the host layer's.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapters import HostLayer, ModulesToSaveWrapper, host_layers
from deltaw.adapters.inject import carriers
from deltaw.errors import MergeError, did_you_mean
from deltaw.modules import dtype_of, set_submodule, shared_owners

__all__ = ["MergeReport", "merge_adapters", "merge_report", "unload", "unmerge_adapters"]

log = logging.getLogger("deltaw")


def merge_adapters(model: nn.Module, names: Sequence[str], *, keep: bool = True) -> None:
    """Folds adapters into the base weights of every layer, all or none.

    Args:
        keep: keep a copy of each base weight, so that unmerging is bitwise.

    Raises:
        MergeError: unknown or already merged adapters, or a result that is not finite; the base is then unchanged.
    """
    hosts = list(host_layers(model))
    known = {name for _, host in hosts for name in host.adapters}
    for name in names:
        if name not in known:
            raise MergeError(f"no adapter {name!r} to merge; there are {sorted(known)}{did_you_mean(name, known)}")
    twice = sorted({name for name in names for _, host in hosts if name in host.merged_adapters})
    if twice:
        raise MergeError(f"adapters {twice} are merged already; call unmerge_adapter() before merging again")
    _check_finite(hosts, names)
    done: list[HostLayer] = []
    for path, host in hosts:
        _untie(model, path, host)
        try:
            host.merge(names, keep=keep)
        except MergeError as error:
            if keep:
                for merged in done:
                    merged.unmerge(list(names))
            raise MergeError(f"{path}: {error}") from None
        done.append(host)


def _check_finite(hosts: list[tuple[str, HostLayer]], names: Sequence[str]) -> None:
    """Refuses before the first write: NaN in an adapter, and sums that overflow a half-precision base."""
    bad = []
    for path, host in hosts:
        mine = [name for name in names if name in host.adapters]
        for name in mine:
            if not all(bool(torch.isfinite(p).all()) for p in host.adapters[name].parameters()):
                bad.append(f"{path} ({name})")
        if mine and host.store.dtype == torch.float16 and not bad:
            host.merged_tensors(mine)  # raises when the sum overflows
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise MergeError(f"cannot merge: adapter weights are not finite in {shown}; the base was left as it was")


def _untie(model: nn.Module, path: str, host: HostLayer) -> None:
    """A weight that other modules share gets a copy of its own before it is written, and it is said aloud."""
    weight = getattr(host.base_layer, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return
    own = f"{path}.base_layer.weight"
    others = [owner for owner in shared_owners(model, weight) if owner != own]
    if not others:
        return
    log.warning("%s was tied to %s; merging gives it weights of its own", path, ", ".join(others))
    host.base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    _mark_untied(model)


def _mark_untied(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def unmerge_adapters(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Takes adapters (default: all) out of the base weights; with none left the base is bitwise what it was."""
    for _, host in host_layers(model):
        host.unmerge(names)


@torch.no_grad()
def unload(model: nn.Module, names: Sequence[str], *, merge: bool) -> nn.Module:
    """Removes every adapter from ``model`` and returns it as a plain model.

    Args:
        names: the active adapters, whose updates stay when ``merge`` (their ``modules_to_save`` too).
        merge: fold the adapters in first; otherwise the base comes back as it was.
    """
    if merge:
        left = [name for name in names if not any(name in host.merged_adapters for _, host in host_layers(model))]
        if left:
            merge_adapters(model, left, keep=False)
    else:
        unmerge_adapters(model)
    for path, carrier in carriers(model):
        if isinstance(carrier, HostLayer):
            set_submodule(model, path, carrier.base_layer)
            continue
        assert isinstance(carrier, ModulesToSaveWrapper)
        copy = next((carrier.modules_to_save[n] for n in names if n in carrier.modules_to_save), None)
        if not merge or copy is None:
            set_submodule(model, path, carrier.original_module)
            continue
        wanted = dtype_of(carrier.original_module)
        set_submodule(model, path, copy.to(wanted) if wanted is not None else copy)
        if any(len(shared_owners(model, p)) >= 1 for p in carrier.original_module.parameters()):
            _mark_untied(model)  # the other half of the pair keeps the base's weight
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


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

    def __str__(self) -> str:
        return (
            f"merged against adapter over {self.tokens:,} tokens: logits differ by {self.mean_abs:.2e} on average, "
            f"{self.max_abs:.2e} at most (logits are {self.scale:.1f} on average); same top token at "
            f"{self.same_argmax:.2%}; KL {self.kl:.2e} nats a token"
        )


@torch.no_grad()
def merge_report(model: Any, batches: Sequence[dict[str, Tensor]]) -> MergeReport:
    """Merges the active adapters, compares logits on ``batches``, and unmerges again (bitwise).

    Args:
        model: a PeftModel of a causal language model.
        batches: keyword arguments of forward, e.g. ``{"input_ids": ..., "attention_mask": ...}`` with (b, t) tensors.

    Raises:
        MergeError: the adapters are merged already.
    """
    if any(host.merged for _, host in host_layers(model)):
        raise MergeError("merge_report compares before and after: call unmerge_adapter() first")
    training = model.training
    model.eval()
    try:
        apart = [model(**batch).logits.float() for batch in batches]
        merge_adapters(model, list(model.active_adapters))
        try:
            together = [model(**batch).logits.float() for batch in batches]
        finally:
            unmerge_adapters(model)
    finally:
        model.train(training)
    rows = []
    for a, b, batch in zip(apart, together, batches, strict=True):
        mask = batch.get("attention_mask")
        keep = torch.ones(a.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        rows.append((a[keep], b[keep]))
    a, b = (torch.cat(side) for side in zip(*rows, strict=True))
    gap = (a - b).abs()
    kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="batchmean")
    return MergeReport(
        tokens=a.shape[0],
        max_abs=gap.max().item(),
        mean_abs=gap.mean().item(),
        scale=a.abs().mean().item(),
        same_argmax=(a.argmax(-1) == b.argmax(-1)).float().mean().item(),
        kl=max(0.0, kl.item()),
    )
