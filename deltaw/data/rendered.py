"""One example as token ids and labels. Knows nothing of how it is made."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["IGNORE", "Rendered"]

IGNORE = -100


@dataclass(frozen=True)
class Rendered:
    """One example, ready to be batched. `labels` are the ids where the loss is taken, `IGNORE` elsewhere.

    Attributes:
        length_before_truncation: tokens before anything was cut.
        cut_supervised: supervised tokens that cutting took.
        escaped: control tokens that the row's own text holds; they were encoded as plain characters.
    """

    input_ids: list[int]
    labels: list[int]
    length_before_truncation: int
    cut_supervised: int = 0
    escaped: int = 0

    @property
    def supervised(self) -> int:
        """How many tokens the loss covers."""
        return len(self.labels) - self.labels.count(IGNORE)

    def as_features(self) -> dict[str, list[int]]:
        """What a data loader hands to the collator."""
        return {"input_ids": self.input_ids, "labels": self.labels}
