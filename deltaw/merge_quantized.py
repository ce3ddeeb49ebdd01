"""A merge into a quantized base beside one into plain layers: what either changes, and which of the two is better.

Merging into 4 bits rounds the sum to 4 bits again, and a small update may vanish in that. Merging into plain layers of
the values that the base is read as rounds to their dtype alone, and takes four times the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.adapters import host_layers
from deltaw.errors import MergeError
from deltaw.merge import MergeReport, Requantization, logits_of, make_hosts_dense, merge_adapters, unmerge_adapters

__all__ = ["QuantizedMergeReport", "quantized_merge_report"]


@dataclasses.dataclass(frozen=True)
class QuantizedMergeReport:
    """Both merges of one adapter, compared with the adapter beside its quantized base."""

    #: into the quantized base: ``merge_and_unload()``
    quantized: MergeReport
    #: into plain layers: ``merge_and_unload(dequantize=True)``
    dequantized: MergeReport
    #: what the first rounds off, layer by layer
    rounding: Requantization

    @property
    def better(self) -> str:
        """``"quantized"`` or ``"dequantized"``, by the mean KL divergence from the adapter beside its base."""
        return "quantized" if self.quantized.kl <= self.dequantized.kl else "dequantized"

    def __str__(self) -> str:
        return f"quantized: {self.quantized}\n{self.rounding}\ndequantized: {self.dequantized}\nbetter: {self.better}"


@torch.no_grad()
def quantized_merge_report(model: Any, batches: Sequence[dict[str, Tensor]]) -> QuantizedMergeReport:
    """Merges the active adapters both ways, compares logits on ``batches``, and puts everything back, bitwise.

    Needs the memory of the adapted layers in plain form.

    Args:
        model: a PeftModel of a causal language model over a quantized base.
        batches: keyword arguments of forward, e.g. ``{"input_ids": ..., "attention_mask": ...}`` with (b, t) tensors.

    Raises:
        MergeError: the adapters are merged already, or no layer of theirs is quantized.
    """
    hosts = list(host_layers(model.get_base_model()))
    if any(host.merged for _, host in hosts):
        raise MergeError("a report compares before and after: call unmerge_adapter() first")
    names = list(model.active_adapters)
    if not any(host.store.quantized and set(names) & host.adapters.keys() for _, host in hosts):
        raise MergeError(
            f"no layer of adapters {names} is quantized; merge_report() compares a merge into a plain base"
        )
    apart = logits_of(model, batches)
    try:
        merge_adapters(model, names, measuring=True)
        rounding = Requantization.of(hosts)
        quantized = MergeReport.between(apart, logits_of(model, batches))
    finally:
        unmerge_adapters(model)
    layers = make_hosts_dense(model)
    try:
        merge_adapters(model, names, measuring=True)
        dequantized = MergeReport.between(apart, logits_of(model, batches))
    finally:
        unmerge_adapters(model)
        for host, layer in layers:
            host.base_layer = layer
    assert rounding is not None
    return QuantizedMergeReport(quantized, dequantized, rounding)
