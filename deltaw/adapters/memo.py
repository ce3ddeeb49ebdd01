"""A value computed from tensors, kept for as long as none of them changes. Knows nothing of what is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Memo"]


class Memo:
    """Holds one tensor and remembers what it was computed from.

    A change is seen when a tensor is written to, replaced, moved or cast. What is not seen is a write behind autograd's
    back (``parameter.data.copy_(...)``): whoever expects one calls :meth:`forget`. Copies and pickles come out empty.
    """

    def __init__(self) -> None:
        self._stamps: tuple[Any, ...] | None = None
        self._value: Tensor | None = None

    def get(self, sources: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, or what it gave for these ``sources`` as they are now."""
        stamps = tuple(_stamp(source) for source in sources)
        if None in stamps:
            self.forget()
            return compute()
        if self._value is None or stamps != self._stamps:
            self._value, self._stamps = compute(), stamps
        return self._value

    def forget(self) -> None:
        self._value = self._stamps = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Memo:
        return Memo()

    def __reduce__(self) -> tuple[Any, ...]:
        return Memo, ()


def _stamp(tensor: Tensor) -> Any:
    """What is different after any change of ``tensor``; None if that cannot be told.

    The weak reference keeps the storage's address, not its memory, from being used again: a parameter that was moved
    away and back is another one.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return None
    where = StorageWeakRef(tensor.untyped_storage())
    return where, tensor.storage_offset(), tensor._version, tensor.dtype, tensor.shape
