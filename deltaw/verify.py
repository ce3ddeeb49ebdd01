"""The proof at the end of a run: what was saved is what was trained, and it changes the base.

Knows nothing of how the run was described or trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw import PeftModel
from deltaw.data import Collator, Rendered
from deltaw.errors import CheckpointError
from deltaw.evaluate.generate import inference

__all__ = ["Parity", "verify_saved"]

_PROBES = 4  # examples that the reloaded adapter is compared on
_TOLERANCE = 1e-5  # of the largest logit: the same arithmetic twice, on a device that may reorder its sums


@dataclass(frozen=True)
class Parity:
    """The adapter read back from disk, compared by its logits on a few training examples.

    Attributes:
        trained: largest difference from the model that was trained; 0 means bit for bit.
        base: largest difference from the base alone.
        scale: largest logit.
    """

    trained: float
    base: float
    scale: float

    def __str__(self) -> str:
        same = "bit for bit the trained model" if self.trained == 0 else f"the trained model to {self.trained:.1e}"
        return f"{same}; it moves the base's logits by up to {self.base:.2g}"


def verify_saved(
    model: Any, folder: str | Path, rendered: list[Rendered], fresh_base: Callable[[], Any] | None = None
) -> Parity:
    """Reads the adapter in ``folder`` back from disk and compares its logits with the trained one's.

    Args:
        model: the trained ``PeftModel``; it is left as it was found.
        folder: where its adapter was saved.
        rendered: training examples; the shortest few are compared on.
        fresh_base: loads another base to put the adapter on; None puts it beside the trained one on the same
            base, which needs no second copy of the weights but is wrong where the base's biases were trained.

    Raises:
        CheckpointError: the adapter read back is not the trained one, or it does not change the base.
    """
    shortest = sorted(rendered, key=lambda one: len(one.input_ids))[:_PROBES]
    batch = Collator(pad_token_id=0)([one.as_features() for one in shortest])
    device = next(model.parameters()).device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    seen = batch["attention_mask"].bool()

    def logits(of: Any) -> torch.Tensor:  # (tokens, vocabulary)
        with inference(of):
            return of(**inputs).logits.float().cpu()[seen]

    trained = logits(model)
    if fresh_base is not None:
        other = fresh_base().to(device)
        base = logits(other)
        reloaded = logits(PeftModel.from_pretrained(other, str(folder)))
    else:
        with model.disable_adapter():
            base = logits(model)
        trained_name = model.active_adapter
        model.load_adapter(str(folder), adapter_name="reloaded")
        try:
            model.set_adapter("reloaded")
            reloaded = logits(model)
        finally:
            model.set_adapter(trained_name)
            model.delete_adapter("reloaded")
    parity = Parity(
        trained=float((reloaded - trained).abs().max()),
        base=float((reloaded - base).abs().max()),
        scale=float(trained.abs().max()),
    )
    if not parity.trained <= _TOLERANCE * parity.scale:
        raise CheckpointError(
            f"the adapter in {folder} is not the one that was trained: read back, its logits differ by up to "
            f"{parity.trained:.3g} (the largest is {parity.scale:.3g}); do not use it, and report this"
        )
    if parity.base == 0:
        raise CheckpointError(
            f"the adapter in {folder} changes nothing: its logits are the base's. Nothing was learned; "
            "look at learning_rate, max_steps, warmup_steps and the loss in trainer_state.json"
        )
    return parity
