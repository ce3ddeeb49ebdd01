"""The few fused operations. They take tensors and weight stores, and know nothing of adapters, layers or models."""

from deltaw.ops.cross_entropy import IGNORE, supervised_cross_entropy, supervised_cross_entropy_through
from deltaw.ops.kron import kron_linear, kron_linear_reference
from deltaw.ops.lowrank import lowrank_linear, lowrank_linear_reference
from deltaw.ops.magnitude import gain, rescale, rescale_reference, row_norms, row_squares
from deltaw.ops.mixed import Update, mixed_linear, mixed_linear_reference

__all__ = [
    "IGNORE",
    "Update",
    "gain",
    "kron_linear",
    "kron_linear_reference",
    "lowrank_linear",
    "lowrank_linear_reference",
    "mixed_linear",
    "mixed_linear_reference",
    "rescale",
    "rescale_reference",
    "row_norms",
    "row_squares",
    "supervised_cross_entropy",
    "supervised_cross_entropy_through",
]
