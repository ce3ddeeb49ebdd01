"""The settings of AdaLoRA, with PEFT's fields. Knows nothing of layers; what they do is said in ``adalora``."""

from __future__ import annotations

import dataclasses
import logging
from typing import ClassVar

from deltaw.adapters.config import PeftType
from deltaw.adapters.methods.lora import LoraConfig

__all__ = ["AdaLoraConfig", "pattern_key"]

log = logging.getLogger("deltaw")

#: settings of LoRA's that mean nothing to AdaLoRA, and what to say instead
_MEANINGLESS = {
    "alpha_pattern": "AdaLoRA has one alpha for all layers; set lora_alpha",
    "lora_bias": "AdaLoRA has no bias of its own; leave it out, or set bias='lora_only'",
    "use_dora": "AdaLoRA has no magnitudes to learn; choose one of the two",
    "use_rslora": "AdaLoRA scales by lora_alpha / init_r; set lora_alpha",
}


@dataclasses.dataclass
class AdaLoraConfig(LoraConfig):
    """Configuration of AdaLoRA, with PEFT's fields; those that choose layers are :class:`TargetedConfig`'s.

    Args:
        target_r: mean rank of a layer that is left at the end.
        init_r: rank of every layer at the start (``r`` has no effect). The update is scaled by ``lora_alpha / init_r``.
        tinit: optimizer steps before the budget begins to fall.
        tfinal: optimizer steps at the end in which the ranks stay as they are.
        deltaT: optimizer steps from one allocation to the next.
        beta1: smoothing of the sensitivity, in (0, 1).
        beta2: smoothing of the uncertainty, in (0, 1).
        orth_reg_weight: weight of the penalty on A and B that are not orthonormal.
        total_step: optimizer steps of the whole run. None: the trainer fills it in when training begins; a loop of your
            own needs it.
        rank_pattern: ``"<layer>.lora_E"`` -> which triplets were kept; written by the allocation.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]

    unsupported: ClassVar[tuple[str, ...]] = (
        *LoraConfig.unsupported,
        "eva_config",
        "loftq_config",
        "target_parameters",
    )
    rank_field = "init_r"
    patterns: ClassVar[tuple[str, ...]] = ()
    customary: ClassVar[dict[str, list[str] | str]] = {
        "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "roberta": ["query", "key", "value", "dense"],
        "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        if self.r != LoraConfig.r and not self.inference_mode:
            log.warning("AdaLoraConfig: r=%s has no effect; the ranks are init_r at first and target_r at last", self.r)

    @property
    def method(self) -> str:
        return str(PeftType.ADALORA)

    def rank_for(self, layer_name: str) -> int:
        """The rank with which this layer is made: what its mask keeps, else ``init_r``."""
        kept = (self.rank_pattern or {}).get(pattern_key(layer_name))
        return self.init_r if kept is None else sum(kept)

    def faults(self) -> list[str]:
        faults = super().faults()
        faults += [f"{f}={getattr(self, f)!r}: a number of steps" for f in ("tinit", "tfinal") if getattr(self, f) < 0]
        if self.deltaT < 1:
            faults.append(f"deltaT={self.deltaT!r}: at least one step (1 is common)")
        for field in ("beta1", "beta2"):
            if not 0 < getattr(self, field) < 1:
                faults.append(f"{field}={getattr(self, field)!r}: a number between 0 and 1 is needed (0.85 is common)")
        if self.orth_reg_weight < 0:
            faults.append(f"orth_reg_weight={self.orth_reg_weight!r}: 0 or more is needed (0.5 is common)")
        if self.total_step is not None:
            faults += self.schedule_faults(self.total_step)
        if self.inference_mode:
            return faults  # PEFT writes what it ignored, and it did not act on it either
        if not 0 < self.target_r <= self.init_r:
            faults.append(f"target_r={self.target_r!r}: a rank from 1 to init_r={self.init_r} is needed")
        faults += [f"{f}={getattr(self, f)!r}: {words}" for f, words in _MEANINGLESS.items() if getattr(self, f)]
        if isinstance(self.init_lora_weights, str):
            faults.append(f"init_lora_weights={self.init_lora_weights!r}: AdaLoRA has a start of its own; use True")
        return faults

    def schedule_faults(self, total_step: int) -> list[str]:
        """What keeps a run of ``total_step`` optimizer steps from handing out ranks."""
        if total_step <= 0:
            return [f"total_step={total_step!r}: the number of optimizer steps of the run"]
        if self.tinit >= total_step - self.tfinal:
            return [
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of the {total_step} steps of the run to hand "
                "out ranks in; lower them, or train longer"
            ]
        return []


def pattern_key(layer_name: str) -> str:
    """A layer's key in ``rank_pattern``."""
    return f"{layer_name}.lora_E"
