"""The proof at the end of a run: what was saved is what was trained, it changes the base, and what merging would cost.

Knows nothing of how the run was described or trained.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw import PeftModel
from deltaw.data import Collator, Rendered
from deltaw.errors import CheckpointError, MergeError
from deltaw.evaluate.generate import inference
from deltaw.merge import MergeReport, merge_report

__all__ = ["Parity", "free_memory", "verify_saved"]

_PROBES = 4  # examples that the reloaded adapter is compared on
_TOLERANCE = 1e-5  # of the largest logit: the same arithmetic twice, on a device that may reorder its sums
_CGROUP = Path("/sys/fs/cgroup")
_SPARE = 1.2  # times the base's weights: what loading another base takes while it loads

log = logging.getLogger("deltaw")


@dataclass(frozen=True)
class Parity:
    """The adapter read back from disk, compared by its logits on a few training examples.

    Attributes:
        trained: largest difference from the model that was trained; 0 means bit for bit.
        base: largest difference from the base alone.
        scale: largest logit.
        fresh: whether it was put on a base that was loaded anew, and not on the trained one's.
        note: why not, or why no merge was measured; else empty.
        merged: the adapter folded into the base, against the two apart; None where that was not measured.
    """

    trained: float
    base: float
    scale: float
    fresh: bool = False
    note: str = ""
    merged: MergeReport | None = None

    def __str__(self) -> str:
        same = "bit for bit the trained model" if self.trained == 0 else f"the trained model to {self.trained:.1e}"
        where = " on a fresh base" if self.fresh else ""
        told = f"{same}{where}; it moves the base's logits by up to {self.base:.2g}"
        if self.merged is not None:
            told += (
                f"; merging moves them by up to {self.merged.max_abs:.1e} "
                f"(same top token at {self.merged.same_argmax:.1%})"
            )
        return f"{told} ({self.note})" if self.note else told

    def sentences(self) -> list[str]:
        """What was compared and found, for a model card."""
        where = "a fresh base" if self.fresh else "the trained model's base"
        same = "equals the trained model bit for bit" if self.trained == 0 else f"differs by at most {self.trained:.2e}"
        told = [
            f"Read back onto {where}, it {same} (the largest logit is {self.scale:.3g}).",
            f"It moves the logits of the base by up to {self.base:.3g}.",
        ]
        if self.merged is not None:
            told.append(f"Folded into the base: {self.merged}.")
        return [*told, f"Note: {self.note}."] if self.note else told


def verify_saved(
    model: Any,
    folder: str | Path,
    rendered: list[Rendered],
    fresh_base: Callable[[], Any] | None = None,
    *,
    merge: bool = True,
) -> Parity:
    """Reads the adapter in ``folder`` back from disk and compares its logits with the trained one's.

    Args:
        model: the trained ``PeftModel``; it is left as it was found.
        folder: where its adapter was saved.
        rendered: training examples; the shortest few are compared on.
        fresh_base: loads another base to put the adapter on. None, or no memory for a second base: the adapter is put
            beside the trained one on the same base, and ``fresh`` and ``note`` say so; that cannot see a change of the
            base itself.
        merge: also measure what merging changes, on the base that was loaded for this.

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

    trained, merged = logits(model), None
    other, note = _fresh(fresh_base, model, device)
    if other is not None:
        base = logits(other)
        again = PeftModel.from_pretrained(other, str(folder)).eval()
        reloaded = logits(again)
        if merge:
            merged, note = _merged(again, inputs)
    else:
        with model.disable_adapter():
            base = logits(model)
        with _beside(model, folder):
            reloaded = logits(model)
    parity = Parity(
        trained=float((reloaded - trained).abs().max()),
        base=float((reloaded - base).abs().max()),
        scale=float(trained.abs().max()),
        fresh=other is not None,
        note=note,
        merged=merged,
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


def _fresh(load: Callable[[], Any] | None, model: Any, device: torch.device) -> tuple[Any, str]:
    """Another base, or None and why there is none."""
    if load is None:
        return None, ""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    needed, free = int(_SPARE * sum(storages.values())), free_memory(device)
    if free is not None and needed > free:
        return None, (
            f"read back beside the trained adapter: a second base would take {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} are free"
        )
    try:
        return load().to(device), ""
    except (torch.OutOfMemoryError, MemoryError):
        return None, "read back beside the trained adapter: memory ran out while a second base was loaded"


@contextmanager
def _beside(model: Any, folder: str | Path) -> Iterator[None]:
    """The adapter in ``folder`` active in ``model``, in place of the trained one."""
    trained = model.active_adapter
    model.load_adapter(str(folder), adapter_name="reloaded")
    try:
        model.set_adapter("reloaded")
        yield
    finally:
        model.set_adapter(trained)
        model.delete_adapter("reloaded")


def _merged(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[MergeReport | None, str]:
    try:
        return merge_report(model, [inputs]), ""
    except MergeError as error:
        return None, f"not merged: {error}"
    except (torch.OutOfMemoryError, MemoryError):
        return None, "not merged: memory ran out"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device``: of a GPU, or of this machine and the group (cgroup) the process is in;
    None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo", encoding="ascii") as file:
            said = [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
        free.append(said[0] if said else pages)
        most, used = (
            Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
            for name in ("memory.max", "memory.current")
        )
        cache = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        if most.strip() != "max":
            free.append(int(most) - int(used) + int(cache.get("inactive_file", 0)))
    except (OSError, ValueError, AttributeError):
        pass
    return max(0, min(free)) if free else None
