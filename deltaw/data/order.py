"""In which order examples are seen: a function of (seed, epoch) and of nothing else. Knows nothing of tokens.

transformers' samplers draw from PyTorch's global generator, so that their order depends on whatever drew before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from deltaw.data.packing import pack

__all__ = ["EpochSampler", "Order", "batch_waste", "epoch_order"]

Order = Literal["random", "sequential", "group_by_length"]

#: batches whose examples are sorted by length together: enough that a batch has hardly any padding, few enough that
#: an example's companions change from epoch to epoch
GROUPED = 50


def epoch_order(
    n: int, order: Order, seed: int, epoch: int, *, lengths: np.ndarray | None = None, batch_size: int = 1
) -> np.ndarray:
    """(n,) int64: the examples of one epoch in their order.

    Args:
        n: how many there are.
        order: ``sequential``, ``random``, or ``group_by_length``: random, but examples of like length share a batch.
        lengths: (n,) tokens of each, for ``group_by_length``.
        batch_size: examples that are padded to one length.
    """
    if order == "sequential":
        return np.arange(n)
    random = np.random.default_rng([seed, epoch])
    drawn = random.permutation(n)
    if order == "random":
        return drawn
    if lengths is None:
        raise ValueError("group_by_length needs the lengths of the examples")
    whole = n - n % batch_size  # the last batch is the one that may be short
    sorted_ = [
        part[np.argsort(-lengths[part], kind="stable")]
        for part in np.split(drawn[:whole], range(GROUPED * batch_size, whole, GROUPED * batch_size))
    ]
    batches = np.concatenate(sorted_).reshape(-1, batch_size)
    batches = batches[random.permutation(len(batches))]
    if len(batches):
        # the batch that takes most memory comes first: a run that cannot hold it fails at once
        widest = int(lengths[batches].max(1).argmax())
        batches[[0, widest]] = batches[[widest, 0]]
    return np.concatenate([batches.reshape(-1), drawn[whole:]])


class EpochSampler(Sampler[int]):
    """Yields the indices of :func:`epoch_order`; trainers and accelerate call ``set_epoch``.

    Args:
        n, order, seed, lengths, batch_size: see :func:`epoch_order`.
    """

    def __init__(
        self, n: int, order: Order, seed: int, *, lengths: np.ndarray | None = None, batch_size: int = 1
    ) -> None:
        self.n, self.seed, self.epoch = n, seed, 0
        self.order: Order = order
        self.lengths, self.batch_size = lengths, batch_size

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.n, self.order, self.seed, self.epoch, lengths=self.lengths, batch_size=self.batch_size)
        return iter(order.tolist())


def batch_waste(
    lengths: Sequence[int] | np.ndarray, batch_size: int, max_length: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Share of the places of an epoch's batches that hold no token, for each way to make batches.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a padded batch.
        max_length: places of a packed row; None leaves packing out.
        seed: of the order that is judged.

    Returns:
        For ``random``, ``group_by_length``, ``padding_free`` and ``packing``. Packed rows are laid end to end, so what
        is missing there costs no time: it tells how evenly filled the steps are.
    """
    sizes = np.asarray(lengths, np.int64)
    if not len(sizes):
        return {}

    def padded(order: Order) -> float:
        seen = sizes[epoch_order(len(sizes), order, seed, 0, lengths=sizes, batch_size=batch_size)]
        starts = np.arange(0, len(seen), batch_size)
        rows = np.diff(np.append(starts, len(seen)))
        return 1.0 - float(sizes.sum()) / float((np.maximum.reduceat(seen, starts) * rows).sum())

    shares = {"random": padded("random"), "group_by_length": padded("group_by_length"), "padding_free": 0.0}
    if max_length is not None:
        rows = len(pack(sizes, max_length, seed))
        shares["packing"] = 1.0 - float(sizes.sum()) / (rows * max_length)
    return shares
