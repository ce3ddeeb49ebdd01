"""Lists of ids and labels -> one batch: padded, or one row without padding. Knows nothing of tokenizers or text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deltaw.data.rendered import IGNORE
from deltaw.errors import DataError

__all__ = ["Collator", "FlatCollator"]


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
            DataError: no features, an example whose ids and labels differ in length, or one that is packed.
        """
        lengths = _lengths(features)
        if any("seq_lengths" in feature for feature in features):
            raise DataError("rows that hold several examples (seq_lengths) need a FlatCollator: padded, they would mix")
        width = max(lengths)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(features), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            input_ids[row, :length] = torch.as_tensor(feature["input_ids"])
            labels[row, :length] = torch.as_tensor(feature["labels"])
            attention_mask[row, :length] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


@dataclass(frozen=True)
class FlatCollator:
    """Lays all examples of a batch end to end in one row, each with positions of its own.

    Where one example ends and the next begins is said three times, for whoever reads it: positions that start again
    (transformers makes its block-diagonal mask of them), the bounds that variable-length attention takes under
    transformers' names for them, and labels that never cross.

    Args:
        bounds: also give `cu_seq_lens_q`, `cu_seq_lens_k` (examples + 1,) int32 and `max_length_q`, `max_length_k`;
            a model whose forward takes no further arguments would refuse them.
    """

    bounds: bool = True

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Features -> `input_ids`, `labels` and `position_ids`, each (1, tokens) int64, and the bounds.

        Args:
            features: each with `input_ids` and `labels` of one length, and with `seq_lengths` where it is several
                examples already; other keys are left out.

        Raises:
            DataError: no features, an example whose ids and labels differ in length, or `seq_lengths` that do not add
                up to it.
        """
        rows = _lengths(features)
        parts: list[int] = []
        for i, (feature, length) in enumerate(zip(features, rows, strict=True)):
            own = [int(n) for n in feature.get("seq_lengths", [length])]
            if sum(own) != length or min(own, default=0) < 0:
                raise DataError(f"example {i} of the batch: seq_lengths {own} of {length} input_ids")
            parts += [n for n in own if n]
        if not parts:
            raise DataError("a batch needs at least one token")
        lengths = np.array(parts)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        ids = np.concatenate([np.asarray(feature["input_ids"], np.int64) for feature in features])
        labels = np.concatenate([np.asarray(feature["labels"], np.int64) for feature in features])
        labels[starts] = IGNORE  # the last token of one example must not be taught the first of the next
        positions = np.arange(ends[-1]) - np.repeat(starts, lengths)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(positions)[None],
        }
        if self.bounds:
            bounds = torch.from_numpy(np.append(0, ends).astype(np.int32))
            longest = int(lengths.max())
            batch |= {
                "cu_seq_lens_q": bounds,
                "cu_seq_lens_k": bounds,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        return batch


def _lengths(features: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens of each feature, all of which have as many labels."""
    if not features:
        raise DataError("a batch needs at least one example")
    lengths = [len(feature["input_ids"]) for feature in features]
    for i, (feature, length) in enumerate(zip(features, lengths, strict=True)):
        if len(feature["labels"]) != length:
            raise DataError(f"example {i} of the batch: {length} input_ids, {len(feature['labels'])} labels")
    return lengths
