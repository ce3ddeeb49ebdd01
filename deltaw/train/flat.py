"""Whether a model can hold several examples in one row, and how it is told where they end: proven, not assumed.

Knows nothing of losses and trainers.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data import Collator, FlatCollator
from deltaw.errors import ModelError
from deltaw.ops.attention import ATTENTION, example_bounds
from deltaw.train.parts import base_of, decoder_of

__all__ = ["BOUNDS", "flat_inputs", "require_flat"]

log = logging.getLogger("deltaw")

#: transformers' names for where the examples of a row begin and end
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

_proven: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = weakref.WeakKeyDictionary()


def flat_inputs(base: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``inputs`` of a flat batch as ``base`` takes them: without the bounds where its attention reads a mask.

    And without a cache: given one, transformers looks at no positions, and the examples would see each other.

    Raises:
        ModelError: see :func:`require_flat`.
    """
    left_out = () if require_flat(base) else BOUNDS
    return {key: inputs[key] for key in inputs if key not in left_out} | {"use_cache": False}


def require_flat(model: Any) -> bool:
    """Proves once that examples in one row do not see each other in ``model`` as it attends now.

    Three short examples run in one row and one by one; then one of them is changed, and the others may not follow by
    more than they do from a row of their own, where nothing can reach them (in half precision: by no bit, mostly).

    Returns:
        Whether attention takes the examples' bounds; otherwise transformers makes a mask of their positions.

    Raises:
        ModelError: neither keeps them apart.
    """
    base = base_of(model)
    known = _proven.setdefault(base, {})
    attention = str(base.config._attn_implementation)
    if attention not in known:
        known[attention] = _prove(base, attention)
    return known[attention]


def _prove(base: PreTrainedModel, attention: str) -> bool:
    ways = [False]
    # a model that promises to work with flash attention hands everything that decides what is seen to its attention
    if "flash" in attention or (attention == ATTENTION and base._supports_flash_attn):
        ways.insert(0, True)
    faults = []
    training = base.training
    base.eval()
    try:
        for bounds in ways:
            fault = _fault(base, bounds)
            if fault is None:
                how = "bounds" if bounds else "positions"
                log.debug("%s tells examples in one row apart by their %s", type(base).__name__, how)
                return bounds
            faults.append(fault)
    finally:
        base.train(training)
    raise ModelError(
        f"{type(base).__name__} (attention {attention!r}) cannot hold several examples in one row: {faults[-1]}; "
        "leave out packing and padding_free, and group examples with train_sampling_strategy: group_by_length"
    )


@torch.no_grad()
def _fault(base: PreTrainedModel, bounds: bool) -> str | None:
    """What goes wrong with several examples in a row, in words; None if nothing does."""
    weight: Any = base.get_input_embeddings().weight
    decoder = decoder_of(base)

    def hidden(collate: Any, *examples: list[int]) -> Tensor:  # (b, t, d)
        features = [{"input_ids": [i % weight.shape[0] for i in ids], "labels": ids} for ids in examples]
        batch = {key: x for key, x in collate(features).items() if key not in ("labels", "attention_mask")}
        batch = {key: x.to(weight.device) if isinstance(x, Tensor) else x for key, x in batch.items()}
        with example_bounds(bounds and BOUNDS[0] in batch):
            return decoder(**batch, use_cache=False).last_hidden_state.float()

    flat, padded = FlatCollator(bounds=bounds), Collator(0)
    first, second = [11, 5, 17, 3, 29, 8, 13], [7, 31, 2, 19, 37]
    others, n = [[i + step for i in first] for step in (1, 7, 30)], len(first)
    try:
        together, changed = (hidden(flat, ids, [23], second)[0] for ids in (first, others[0]))
        alone = torch.cat([hidden(flat, ids)[0] for ids in (first, [23], second)])
        # experts multiply what other rows send them in the same product: where nothing can leak, as much still moves
        rows = [hidden(padded, ids, second)[1] for ids in (first, *others)]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    exact = weight.dtype == torch.float32
    noise = max((row - rows[0]).norm().item() for row in rows)
    leak = (changed[n:] - together[n:]).norm().item()
    if leak > 4 * noise + (2e-6 * together[n:].norm().item() if exact else 0.0):
        return "what one of them says changes what is computed for the next"
    if (together - alone).norm() > (1e-3 if exact else 0.1) * alone.norm():  # other kernels round otherwise
        return "they come out otherwise than each alone"
    return None
