"""Optimizers: AdamW with states in 8 bits, paged, or both; what each needs is measured in docs/optimizers.md."""

from deltaw.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
from deltaw.optim.choice import StateBytes, optimizer_for, state_bytes
from deltaw.optim.memory import mapped_loads

__all__ = [
    "AdamW8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "StateBytes",
    "mapped_loads",
    "optimizer_for",
    "state_bytes",
]
