"""LoRA: W' = W + s B A (Hu et al. 2021, arXiv 2106.09685, section 4.1).

s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora`` (Kalajdzievski 2023, arXiv 2312.03732). Where A and B
are taken out of the base weight at the start (PiSSA, OLoRA), W' = W + s (B A - B0 A0): the base itself is never
changed, so that it is there for the other adapters, for ``disable_adapter`` and for ``unload``. In a file that is LoRA
of rank 2r. Where the base must change (LoftQ, and all of these over a quantized base), W' = Q + s B A over a base Q
that is this adapter's own (``bases``), and a file means the same Q: whoever reads it makes Q again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from deltaw.adapters.base import Adapter, drawing, settle
from deltaw.adapters.config import PeftConfig, PeftType
from deltaw.adapters.host import HostLayer
from deltaw.adapters.lowrank import Factors, LowRank
from deltaw.adapters.methods.init import (
    LOFTQ,
    Start,
    decomposition,
    initialise,
    initialisers,
    is_random,
    known_initialiser,
)
from deltaw.adapters.methods.loftq import LoftQConfig, as_in_4bit, loftq, loftq_faults, taken_out
from deltaw.adapters.targeted import TargetedConfig
from deltaw.errors import AdapterError, CheckpointError, ConfigError, did_you_mean
from deltaw.fullweights import full_weight
from deltaw.weights import wide

__all__ = ["Lora", "LoraConfig", "rate", "remember_settings", "require_bare"]

log = logging.getLogger("deltaw")

A_KEY, B_KEY = "lora_A.weight", "lora_B.weight"
#: of the starting factors among a layer's tensors; no file has them
START_A, START_B = "lora_start.A", "lora_start.B"


@dataclasses.dataclass
class LoraConfig(TargetedConfig):
    """Configuration of LoRA, with PEFT's fields; those that choose layers are :class:`TargetedConfig`'s.

    Args:
        r: rank of the update.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: probability of dropping an element of the adapter's input.
        fan_in_fan_out: kept as PEFT writes it; how a weight is stored is read off the layer.
        bias: which biases train: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        init_lora_weights: True (Kaiming A, zero B), False (both random, for tests), or the name of an
            initialiser: ``"gaussian"``, ``"orthogonal"``, ``"pissa"``, ``"pissa_niter_N"`` (a randomized SVD with N
            iterations), ``"olora"``, ``"loftq"`` (from what 4 bits lose of the base, which is changed). Over a
            quantized base the last four read its full-precision weights (see ``deltaw.full_weights``).
        loftq_config: ``{"loftq_bits": 4, "loftq_iter": 1}`` or a :class:`LoftQConfig`, for ``"loftq"``.
        lora_bias: give B a bias of its own.
        use_dora: learn the magnitude of each output apart from its direction (DoRA).
        trainable_token_indices: rows of the input embedding to train, or ``{embedding name: rows}``.
        ensure_weight_tying: what trains on the input embedding trains on the output head tied to it too.
    """

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    use_dora: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    loftq_config: dict[str, Any] = dataclasses.field(default_factory=dict)

    # PEFT 0.21.2's other fields: accepted and written at these defaults, refused by name otherwise
    alora_invocation_tokens: list[int] | None = None
    arrow_config: Any = None
    corda_config: Any = None
    eva_config: Any = None
    kasa_config: Any = None
    layer_replication: Any = None
    lora_ga_config: Any = None
    megatron_config: Any = None
    megatron_core: str = "megatron.core"
    monteclora_config: Any = None
    qalora_group_size: int = 16
    runtime_config: Any = None
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    use_qalora: bool = False
    velora_config: Any = None

    unsupported: ClassVar[tuple[str, ...]] = (
        "alora_invocation_tokens",
        "arrow_config",
        "corda_config",
        "eva_config",
        "kasa_config",
        "layer_replication",
        "lora_ga_config",
        "megatron_config",
        "monteclora_config",
        "runtime_config",
        "target_parameters",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    )
    unsaved: ClassVar[tuple[str, ...]] = ("runtime_config",)
    alpha_field = "lora_alpha"

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = dataclasses.asdict(self.loftq_config)
        super().__post_init__()
        if self.loftq_config and self.init_lora_weights != LOFTQ:
            # as in PEFT, whose own recipe sets init_lora_weights=True before it saves
            log.warning("loftq_config has no effect: init_lora_weights is %r, not 'loftq'", self.init_lora_weights)
            self.loftq_config = {}
        elif self.init_lora_weights == LOFTQ:
            self.loftq_config = {**dataclasses.asdict(LoftQConfig()), **self.loftq_config}

    @property
    def method(self) -> str:
        return "DORA" if self.use_dora else "LORA"

    def faults(self) -> list[str]:
        faults = super().faults() + self._probability("lora_dropout")
        if self.bias not in ("none", "all", "lora_only"):
            faults.append(f"bias={self.bias!r}: use 'none', 'all' or 'lora_only'")
        if not known_initialiser(self.init_lora_weights):
            names = initialisers()
            faults.append(
                f"init_lora_weights={self.init_lora_weights!r}: use True, False or {', '.join(names)}"
                f"{did_you_mean(str(self.init_lora_weights), names)}"
            )
        if self.init_lora_weights == LOFTQ:
            faults += loftq_faults(self.loftq_config)
        if self.lora_bias and isinstance(self.init_lora_weights, str):
            faults.append(
                f"lora_bias=True with init_lora_weights={self.init_lora_weights!r}: PEFT could not read the file; "
                "use init_lora_weights=True, or leave lora_bias out"
            )
        if self.lora_bias and self.use_dora:
            faults.append("lora_bias=True with use_dora=True: DoRA's magnitude does not scale a bias; leave one out")
        return faults


class Lora(LowRank):
    """The low-rank update of one linear layer: A (r, in), B (out, r)."""

    parameter_slots = ("lora_A", "lora_B")
    value_slots = ("lora_dropout", "r", "lora_alpha", "scaling", "use_rslora", "lora_bias", "lora_start")
    prefix = "lora_"

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> Self:
        assert isinstance(config, LoraConfig)
        if config.lora_bias and host.bias is None:
            raise ConfigError(
                f"lora_bias=True, but {layer_name!r} has no bias to merge into; "
                "leave lora_bias out or target other layers"
            )
        r = remember_settings(host, name, config, layer_name)
        out_features, in_features = host.store.shape
        with drawing(host):
            lora_A = nn.Linear(in_features, r, bias=False, dtype=torch.float32)
            lora_B = nn.Linear(r, out_features, bias=config.lora_bias, dtype=torch.float32)
        taken = config.init_lora_weights == LOFTQ or decomposition(config.init_lora_weights) is not None
        if not taken:
            initialise(config.init_lora_weights, lora_A, lora_B)
        host.slot("lora_A", nn.ModuleDict)[name] = settle(host, lora_A)
        host.slot("lora_B", nn.ModuleDict)[name] = settle(host, lora_B)
        adapter = cls(host, name)
        if taken:
            adapter._take_from_base(config, layer_name)
        return adapter

    @torch.no_grad()
    def _take_from_base(self, config: LoraConfig, layer_name: str) -> None:
        """Fills A and B where they come out of the base weight, and remembers them, or changes the base. They are not
        rounded to the base's dtype: A and A0 are the same numbers in any case, and an update starts at zero."""
        host, r, choice = self.host, len(self.lora_A), config.init_lora_weights
        out_features, in_features = host.store.shape
        most = min(out_features, in_features)
        if r > most:
            raise ConfigError(
                f"init_lora_weights={choice!r} with r={r} on {layer_name!r}, which is {out_features} x {in_features}: "
                f"there is no more than rank {most} to take; lower r, for this layer alone with rank_pattern"
            )
        if self.scaling <= 0:
            raise ConfigError(f"init_lora_weights={choice!r} on {layer_name!r} needs a positive lora_alpha")
        require_bare(host, f"init_lora_weights={choice!r} on {layer_name!r}")
        host.bases.put(host.store, None)
        if choice == LOFTQ or host.store.quantized:
            A, B = self._over_own_base(config, layer_name)
        else:
            decompose = decomposition(choice)
            assert decompose is not None
            weight = wide(host.store.dequantize().detach())
            if weight.is_meta:
                A, B = weight.new_empty(r, in_features), weight.new_empty(out_features, r)
            else:
                A, B = decompose(weight, r, self.scaling)
            start = Start(A, B, str(choice))
            host.slot("lora_start", nn.ModuleDict)[self.name] = start
            A, B = start.A, start.B
        if not self.lora_A.is_meta:
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)

    def _over_own_base(self, config: LoraConfig, layer_name: str) -> tuple[Tensor, Tensor]:
        """A and B, and beside them a base weight for this adapter alone."""
        host, store, r = self.host, self.host.store, len(self.lora_A)
        if store.device.type == "meta":
            return self.lora_A, self.lora_B
        if store.quantized:
            weight = full_weight(layer_name, store.shape).to(store.device)
        else:
            weight = wide(store.dequantize().detach()).clone()

        def write(target: Tensor) -> Tensor:
            host.bases.replace(store, self.name, target if store.quantized else as_in_4bit(target))
            return wide(store.dequantize())

        before, decompose = store.dequantize(), decomposition(config.init_lora_weights)
        with torch.device(store.device):  # where the caller makes the adapter's tensors on the meta device
            if decompose is not None:
                A, B = taken_out(weight, write, r, self.scaling, decompose)
            else:
                A, B = loftq(weight, write, r, self.scaling, config.loftq_config["loftq_iter"])
        if store.quantized and torch.equal(store.dequantize(), before):
            host.bases.drop(store, self.name)  # as with a single turn of LoftQ: it is the base that was given
        return A, B

    @property
    def lora_A(self) -> Tensor:
        return self.host.lora_A[self.name].weight  # type: ignore[index, union-attr]

    @property
    def lora_B(self) -> Tensor:
        return self.host.lora_B[self.name].weight  # type: ignore[index, union-attr]

    @property
    def scaling(self) -> float:
        return self.host.scaling[self.name]  # type: ignore[index]

    @property
    def dropout(self) -> float:
        return rate(self.host.lora_dropout[self.name])  # type: ignore[index]

    @property
    def start(self) -> Start | None:
        """A0 and B0; None where the update starts at zero by itself."""
        held: Any = getattr(self.host, "lora_start", None)
        return held[self.name] if held is not None and self.name in held else None

    def factors(self) -> Factors:
        A, B, bias = self.lora_A, self.lora_B, self.host.lora_B[self.name].bias  # type: ignore[index, union-attr]
        start = self.start
        if start is not None:
            # side by side, row by row: what cancels at the start is then added up in one step and leaves nothing
            A = torch.stack((A, start.A.to(A.dtype)), 1).flatten(0, 1)  # (2r, in)
            B = torch.stack((B, -start.B.to(B.dtype)), 2).flatten(1)  # (out, 2r)
        return Factors(A, B, self.scaling, bias, self.dropout)

    def delta_weight(self) -> Tensor:
        update = wide(self.lora_B) @ wide(self.lora_A)  # (out, r) @ (r, in)
        if self.start is not None:
            A, B = self.start.A.to(self.lora_A.dtype), self.start.B.to(self.lora_B.dtype)
            update -= wide(B) @ wide(A)
        return update.mul_(self.scaling)

    # --- files ----------------------------------------------------------------------------------------------

    def places(self) -> dict[str, Tensor]:
        start = self.start
        return {**super().places(), **({} if start is None else {START_A: start.A, START_B: start.B})}

    def file_tensors(self) -> dict[str, Tensor]:
        """A and B; with a start [A; A0] and [B, -B0], LoRA of rank 2r over the unchanged base."""
        tensors = {name: tensor.detach() for name, tensor in self.places().items()}
        if self.start is not None:
            A0, B0 = tensors.pop(START_A), tensors.pop(START_B)
            A, B = tensors[A_KEY], tensors[B_KEY]
            tensors[A_KEY] = torch.cat([A, A0.to(A.dtype)])
            tensors[B_KEY] = torch.cat([B, -B0.to(B.dtype)], 1)
        return tensors

    def unconverted_tensors(self) -> dict[str, Tensor]:
        """A and B alone, whatever the start: PEFT's own form of PiSSA and OLoRA.

        Raises:
            CheckpointError: nobody could make the start again.
        """
        if self.start is not None and is_random(self.start.initialiser):
            raise CheckpointError(
                f"convert_to_lora=False: the start of init_lora_weights={self.start.initialiser!r} is a random SVD, "
                "which whoever reads the file could not repeat; leave convert_to_lora out"
            )
        return {name: tensor.detach() for name, tensor in self.places().items() if name not in (START_A, START_B)}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """With a start both forms fit: LoRA of rank 2r brings A0 and B0 along; of rank r it is PEFT's own form, whose
        start is that of this base."""
        start, A, B = self.start, tensors.get(A_KEY), tensors.get(B_KEY)
        if start is None or START_A in tensors:
            return tensors
        r = len(start.A)
        if A is not None and B is not None and A.shape[:1] == B.shape[1:] == (2 * r,):
            return {**tensors, A_KEY: A[:r], B_KEY: B[:, :r], START_A: A[r:], START_B: -B[:, r:]}
        if is_random(start.initialiser):
            raise CheckpointError(
                f"init_lora_weights={start.initialiser!r}: the file does not hold the adapter's start, which was a "
                "random SVD and cannot be made again; save it as LoRA (in PEFT: "
                "path_initial_model_for_weight_conversion)"
            )
        return {**tensors, START_A: start.A, START_B: start.B}

    @classmethod
    def unconverted_config(cls, config: PeftConfig, adapters: Mapping[str, Adapter]) -> PeftConfig:
        return config

    @classmethod
    def file_config(cls, config: PeftConfig, adapters: Mapping[str, Adapter]) -> PeftConfig:
        """Twice the rank at the same scaling, where :meth:`file_tensors` has it; layers without a start keep theirs.
        Over a base of its own the adapter is written as it is: only who makes that base again can use it."""
        assert isinstance(config, LoraConfig)
        over_own = any(adapter.name in adapter.host.bases for adapter in adapters.values())
        if decomposition(config.init_lora_weights) is None or over_own:
            return config
        widen = math.sqrt(2) if config.use_rslora else 2  # s = alpha / sqrt(r), or alpha / r
        plain = {re.escape(layer): layer for layer, a in adapters.items() if not isinstance(a, Lora) or a.start is None}
        ranks = {key: 2 * rank for key, rank in config.rank_pattern.items()}
        alphas = {key: widen * alpha for key, alpha in config.alpha_pattern.items()}
        return dataclasses.replace(
            config,
            init_lora_weights=True,
            r=2 * config.r,
            lora_alpha=widen * config.lora_alpha,
            rank_pattern={**{key: config.rank_for(layer) for key, layer in plain.items()}, **ranks},
            alpha_pattern={**{key: config.alpha_for(layer) for key, layer in plain.items()}, **alphas},
        )


def require_bare(host: HostLayer, what: str) -> None:
    """
    Raises:
        AdapterError: adapters are merged into the weight of ``host``, and ``what`` must see the base's own.
    """
    if host.merged:
        raise AdapterError(
            f"{what} needs the base weight, and adapters {host.merged_adapters} are merged into it; "
            "call unmerge_adapter() first"
        )


def remember_settings(host: HostLayer, name: str, config: LoraConfig, layer_name: str) -> int:
    """Puts what ``config`` says about this layer into the host's dictionaries, under PEFT's names; returns r."""
    r, alpha = config.rank_for(layer_name), config.alpha_for(layer_name)
    host.slot("lora_dropout", nn.ModuleDict)[name] = (
        nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
    )
    host.slot("r", dict)[name] = r
    host.slot("lora_alpha", dict)[name] = alpha
    host.slot("scaling", dict)[name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    host.slot("use_rslora", dict)[name] = config.use_rslora
    host.slot("lora_bias", dict)[name] = config.lora_bias
    return r


def rate(dropout: nn.Module) -> float:
    """The probability with which an element is dropped now (0 outside training)."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
