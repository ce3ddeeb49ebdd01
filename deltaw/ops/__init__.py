"""The few fused operations. They take tensors and weight stores, and know nothing of adapters, layers or models."""

from deltaw.ops.cross_entropy import IGNORE, supervised_cross_entropy, supervised_cross_entropy_through
from deltaw.ops.lowrank import lowrank_linear, lowrank_linear_reference

__all__ = [
    "IGNORE",
    "lowrank_linear",
    "lowrank_linear_reference",
    "supervised_cross_entropy",
    "supervised_cross_entropy_through",
]
