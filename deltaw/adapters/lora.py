"""LoRA: W' = W + s B A (Hu et al. 2021, arXiv 2106.09685, section 4.1).

s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora`` (Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.adapters.base import Adapter
from deltaw.adapters.config import PeftConfig, PeftType
from deltaw.adapters.host import HostLayer
from deltaw.adapters.init import INITIALISERS, initialiser
from deltaw.errors import ConfigError, did_you_mean
from deltaw.modules import pattern_value
from deltaw.ops import lowrank_linear
from deltaw.weights import WeightStore, wide

__all__ = ["Lora", "LoraConfig"]


@dataclasses.dataclass
class LoraConfig(PeftConfig):
    """Configuration of LoRA, with PEFT's fields.

    Args:
        r: rank of the update.
        target_modules: names or suffixes (list), a full regular expression (str), or ``"all-linear"``; None
            takes the architecture's customary layers.
        exclude_modules: names, suffixes or a regular expression to leave out.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: probability of dropping an element of the adapter's input.
        fan_in_fan_out: the base weight is stored as (in, out).
        bias: which biases train: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        modules_to_save: modules to train and save whole, beside the adapters.
        init_lora_weights: True (Kaiming A, zero B), False (both random, for tests), or the name of an
            initialiser.
        layers_to_transform: index or indices of the layers to adapt.
        layers_pattern: name of the list that holds the layers, for ``layers_to_transform``.
        rank_pattern: layer name pattern -> r, where it differs.
        alpha_pattern: layer name pattern -> lora_alpha, where it differs.
        lora_bias: give B a bias of its own.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = dataclasses.field(default_factory=dict)
    lora_bias: bool = False

    # PEFT 0.21.2's other fields: accepted and written at these defaults, refused by name otherwise
    alora_invocation_tokens: list[int] | None = None
    arrow_config: Any = None
    corda_config: Any = None
    ensure_weight_tying: bool = False
    eva_config: Any = None
    kasa_config: Any = None
    layer_replication: Any = None
    loftq_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    lora_ga_config: Any = None
    megatron_config: Any = None
    megatron_core: str = "megatron.core"
    monteclora_config: Any = None
    qalora_group_size: int = 16
    runtime_config: Any = None
    target_parameters: list[str] | None = None
    trainable_token_indices: Any = None
    use_bdlora: Any = None
    use_dora: bool = False
    use_qalora: bool = False
    velora_config: Any = None

    unsupported: ClassVar[tuple[str, ...]] = (
        "alora_invocation_tokens",
        "arrow_config",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "kasa_config",
        "layer_replication",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "monteclora_config",
        "runtime_config",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "velora_config",
    )
    unsaved: ClassVar[tuple[str, ...]] = ("runtime_config",)

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        for field in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"):
            if isinstance(getattr(self, field), (tuple, set, frozenset, range)):
                setattr(self, field, list(getattr(self, field)))
        for field in ("target_modules", "exclude_modules"):  # PEFT keeps a set; files hold it sorted
            value = getattr(self, field)
            if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
                setattr(self, field, set(value))
        super().__post_init__()

    def faults(self) -> list[str]:
        faults = super().faults()
        if self.r <= 0:
            faults.append(f"r={self.r!r}: the rank must be a positive integer (8 and 16 are common)")
        if not math.isfinite(self.lora_alpha):
            faults.append(f"lora_alpha={self.lora_alpha!r}: a finite number is needed (r or 2 r is common)")
        if not 0.0 <= self.lora_dropout < 1.0:
            faults.append(f"lora_dropout={self.lora_dropout!r}: a probability in [0, 1) is needed (0.05 is common)")
        if self.bias not in ("none", "all", "lora_only"):
            faults.append(f"bias={self.bias!r}: use 'none', 'all' or 'lora_only'")
        for key, rank in (self.rank_pattern or {}).items():
            if rank <= 0:
                faults.append(f"rank_pattern[{key!r}]={rank!r}: the rank must be a positive integer")
        for field, expression in self._expressions():
            try:
                re.compile(expression)
            except re.error as error:
                faults.append(f"{field}: {expression!r} is not a regular expression ({error})")
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights not in INITIALISERS:
            faults.append(
                f"init_lora_weights={self.init_lora_weights!r}: use True, False or {', '.join(INITIALISERS)}"
                f"{did_you_mean(self.init_lora_weights, INITIALISERS)}"
            )
        if self.fan_in_fan_out:
            faults.append("fan_in_fan_out=True: only layers that keep (out, in) weights are supported")
        if self.layers_pattern and self.layers_to_transform is None:
            faults.append("layers_pattern is set but layers_to_transform is not: name the layers, or drop the pattern")
        if (
            isinstance(self.target_modules, str)
            and self.target_modules.lower() != "all-linear"
            and self.layers_to_transform is not None
        ):
            faults.append("layers_to_transform needs target_modules as a list; write the layers into the expression")
        return faults

    def _expressions(self) -> Iterator[tuple[str, str]]:
        """(field, regular expression) of all that are given."""
        for field in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, field), str):
                yield field, getattr(self, field)
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for field, keys in (
            ("layers_pattern", patterns),
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
        ):
            for key in keys or []:
                yield field, key

    def rank_for(self, layer_name: str) -> int:
        """r of this layer, after ``rank_pattern``."""
        hit = pattern_value(self.rank_pattern or {}, layer_name)
        return self.r if hit is None else int(hit[1])

    def alpha_for(self, layer_name: str) -> float:
        """lora_alpha of this layer, after ``alpha_pattern``."""
        hit = pattern_value(self.alpha_pattern or {}, layer_name)
        return self.lora_alpha if hit is None else hit[1]


class Lora(Adapter):
    """The low-rank update of one linear layer: A (r, in), B (out, r)."""

    parameter_slots = ("lora_A", "lora_B")
    value_slots = ("lora_dropout", "r", "lora_alpha", "scaling", "use_rslora", "lora_bias")
    prefix = "lora_"

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> Lora:
        assert isinstance(config, LoraConfig)
        r, alpha = config.rank_for(layer_name), config.alpha_for(layer_name)
        if config.lora_bias and host.bias is None:
            raise ConfigError(
                f"lora_bias=True, but {layer_name!r} has no bias to merge into; "
                "leave lora_bias out or target other layers"
            )
        out_features, in_features = host.store.shape
        # drawn in float32 on the CPU, so that a seed means the same everywhere; on the meta device when the
        # caller has set it, because a file is to fill the tensors
        device, dtype = host.store.device, host.store.dtype
        if torch.get_default_device().type == "meta":
            device = torch.device("meta")
        with torch.device("meta" if device.type == "meta" else "cpu"):
            lora_A = nn.Linear(in_features, r, bias=False, dtype=torch.float32)
            lora_B = nn.Linear(r, out_features, bias=config.lora_bias, dtype=torch.float32)
        host.slot("lora_dropout", nn.ModuleDict)[name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        )
        host.slot("lora_A", nn.ModuleDict)[name] = lora_A
        host.slot("lora_B", nn.ModuleDict)[name] = lora_B
        host.slot("r", dict)[name] = r
        host.slot("lora_alpha", dict)[name] = alpha
        host.slot("scaling", dict)[name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        host.slot("use_rslora", dict)[name] = config.use_rslora
        host.slot("lora_bias", dict)[name] = config.lora_bias
        initialiser(config.init_lora_weights)(lora_A, lora_B)
        for layer in (lora_A, lora_B):
            # PEFT's draw passes through the base's dtype before it becomes a float32 master: same seed, same
            # adapter
            layer.to(dtype).to(device, torch.promote_types(dtype, torch.float32))
        return cls(host, name)

    @property
    def lora_A(self) -> Tensor:
        return self.host.lora_A[self.name].weight  # type: ignore[index, union-attr]

    @property
    def lora_B(self) -> Tensor:
        return self.host.lora_B[self.name].weight  # type: ignore[index, union-attr]

    @property
    def bias(self) -> Tensor | None:
        return self.host.lora_B[self.name].bias  # type: ignore[index, union-attr]

    @property
    def scaling(self) -> float:
        return self.host.scaling[self.name]  # type: ignore[index]

    @property
    def dropout(self) -> float:
        """The probability with which an element of the input is dropped now (0 outside training)."""
        layer = self.host.lora_dropout[self.name]  # type: ignore[index]
        return layer.p if isinstance(layer, nn.Dropout) and layer.training else 0.0

    def delta_weight(self) -> Tensor:
        return (wide(self.lora_B) @ wide(self.lora_A)) * self.scaling  # (out, r) @ (r, in)

    def merged_bias(self, bias: Tensor | None) -> Tensor | None:
        if self.bias is None or bias is None:
            return bias
        return bias + wide(self.bias) * self.scaling

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout) if self.dropout else x
        low = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        up = F.linear(low, self.lora_B.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        return base_out + (up * self.scaling).to(base_out.dtype)

    def linear(self, x: Tensor, store: WeightStore, bias: Tensor | None) -> Tensor:
        if self.bias is not None:
            extra = self.bias * self.scaling
            bias = extra if bias is None else bias + extra.to(bias.dtype)
        return lowrank_linear(x, store, bias, self.lora_A, self.lora_B, self.scaling, dropout=self.dropout)
