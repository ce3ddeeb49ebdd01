"""Lists of ids and labels -> one padded batch. Knows nothing of tokenizers or text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltaw.errors import DataError

__all__ = ["Collator"]


@dataclass(frozen=True)
class Collator:
    """Pads a list of features on the right.

    What is padding follows from each example's length and never from comparing ids with `pad_token_id`:
    where pad is also the end of the turn, that comparison erases the stop token from the labels and from
    the attention mask.

    Args:
        pad_token_id: the id written into padded places of `input_ids`.
        pad_to_multiple_of: round the batch's length up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Features -> `input_ids`, `labels` and `attention_mask`, each (batch, length) int64.

        Args:
            features: each with `input_ids` and `labels` of one length; other keys are left out.

        Raises:
            DataError: no features, or an example whose ids and labels differ in length.
        """
        if not features:
            raise DataError("a batch needs at least one example")
        lengths = [len(feature["input_ids"]) for feature in features]
        for i, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            if len(feature["labels"]) != length:
                raise DataError(f"example {i} of the batch: {length} input_ids, {len(feature['labels'])} labels")
        width = max(lengths)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(features), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, -100, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            input_ids[row, :length] = torch.as_tensor(feature["input_ids"])
            labels[row, :length] = torch.as_tensor(feature["labels"])
            attention_mask[row, :length] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
