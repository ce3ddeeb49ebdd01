"""AdaLoRA: W' = W + s B (E * A), and ranks that go where they matter (Zhang et al. 2023, arXiv 2303.10512).

Every layer starts with ``init_r`` triplets: a row of A, a singular value in E, a column of B. While the run goes on,
the budget of all layers together falls to ``target_r`` a layer, and the triplets that matter least lose their singular
value. A penalty keeps A and B near orthonormal, so that E is what a singular value is. Both act on the model as a
whole, through the hooks of the adapter contract. What a triplet is worth is ``adalora_budget``'s.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapters.base import Adapter, drawing, settle
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer
from deltaw.adapters.lowrank import Factors, LowRank
from deltaw.adapters.methods.adalora_budget import Importance, Schedule, most_important, triplet_scores
from deltaw.adapters.methods.adalora_config import AdaLoraConfig, pattern_key
from deltaw.adapters.methods.lora import rate
from deltaw.errors import AdapterError, ConfigError
from deltaw.weights import wide

__all__ = ["AdaLora"]

log = logging.getLogger("deltaw")


class AdaLora(LowRank):
    """The update of one linear layer in the form of a singular value decomposition: A (r, in), B (out, r), E (r, 1)."""

    parameter_slots = ("lora_A", "lora_B", "lora_E")
    value_slots = ("lora_dropout", "r", "lora_alpha", "scaling", "ranknum")
    prefix = "lora_"
    steers = True

    def __init__(self, host: HostLayer, name: str) -> None:
        super().__init__(host, name)
        self.init_r = 0
        self.pattern: list[bool] | None = None  # what a file had pruned already, over init_r triplets
        self.mask: Tensor | None = None  # (r,), True for the triplets that the last allocation kept
        self.importance: dict[str, Importance] = {}
        self.driven = False  # whether update_and_allocate was ever called for it
        self.began: Tensor | None = None  # E as it was when training began

    @classmethod
    def create(cls, host: HostLayer, name: str, config: PeftConfig, layer_name: str) -> AdaLora:
        assert isinstance(config, AdaLoraConfig)
        adapter = cls(host, name)
        adapter.init_r = config.init_r
        adapter.pattern = (config.rank_pattern or {}).get(pattern_key(layer_name))
        r = config.rank_for(layer_name)
        out_features, *inner = host.store.shape  # of a convolution: (out, in, *kernel)
        in_features = math.prod(inner)
        with drawing(host):  # in PEFT's order, which draws what it then sets to zero
            A = torch.randn(r, in_features, dtype=torch.float32)
            E = torch.randn(r, 1, dtype=torch.float32)
            B = torch.randn(out_features, r, dtype=torch.float32)
            torch.randn(1)
        if config.init_lora_weights:
            E.zero_()
            A.normal_(std=0.02)
            B.normal_(std=0.02)
        # the one tensor that no file holds, so it is never left on the meta device
        ranknum = torch.full((1,), float(config.init_r), device="cpu")
        alpha = config.lora_alpha
        host.slot("lora_dropout", nn.ModuleDict)[name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        )
        host.slot("r", dict)[name] = r
        host.slot("lora_alpha", dict)[name] = alpha
        host.slot("scaling", dict)[name] = alpha if alpha > 0 else float(config.init_r)
        for slot, drawn in (("lora_A", A), ("lora_B", B), ("lora_E", E)):
            host.slot(slot, nn.ParameterDict)[name] = nn.Parameter(settle(host, drawn))
        host.slot("ranknum", nn.ParameterDict)[name] = nn.Parameter(settle(host, ranknum), requires_grad=False)
        return adapter

    @property
    def lora_A(self) -> Tensor:
        return self.host.lora_A[self.name]  # type: ignore[index, return-value]

    @property
    def lora_B(self) -> Tensor:
        return self.host.lora_B[self.name]  # type: ignore[index, return-value]

    @property
    def lora_E(self) -> Tensor:
        return self.host.lora_E[self.name]  # type: ignore[index, return-value]

    @property
    def dropout(self) -> float:
        return rate(self.host.lora_dropout[self.name])  # type: ignore[index]

    def factors(self) -> Factors:
        if self.began is None and self.host.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.began = self.lora_E.detach().clone()
        # the scale stays that of init_r, also when triplets are gone; a value in Python, which costs no wait on a GPU
        scaling: float = self.host.scaling[self.name] / (self.init_r + 1e-5)  # type: ignore[index, operator]
        return Factors(self.lora_A * self.lora_E, self.lora_B, scaling, None, self.dropout)

    # --- files ----------------------------------------------------------------------------------------------

    def file_tensors(self) -> dict[str, Tensor]:
        """Only the triplets that the last allocation kept; what others grew since (``deltaT`` > 1) is left out."""
        mask = self.mask
        tensors = super().file_tensors()
        return tensors if mask is None else {name: t[_kept(name, mask)] for name, t in tensors.items()}

    def from_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.began = None  # what a file brings is not training
        if self.mask is None:
            return tensors
        placed = dict(tensors)
        for name, place in self.places().items():
            # a file holds the kept triplets; here the others have their place too, and a singular value of zero
            whole = torch.zeros_like(place) if name == "lora_E" else place.detach().clone()
            where = _kept(name, self.mask)
            if name in tensors and tensors[name].shape == whole[where].shape:
                whole[where] = tensors[name].to(whole)
                placed[name] = whole
        return placed

    @classmethod
    def file_config(cls, config: PeftConfig, adapters: Mapping[str, Adapter]) -> PeftConfig:
        """
        Raises:
            AdapterError: the adapter was trained, but ranks were never handed out.
        """
        assert isinstance(config, AdaLoraConfig)
        _require_driven(_layers(adapters).values())
        if config.total_step is None:
            log.warning("AdaLoraConfig.total_step is not set; deltaw reads the file, but PEFT refuses it without")
        return config

    # --- training the whole model ---------------------------------------------------------------------------

    @classmethod
    def penalty(cls, config: PeftConfig, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """orth_reg_weight times the mean over all A and B of the Frobenius norms of A Aᵀ - I and Bᵀ B - I: PEFT's
        form of section 3.1, whose norms are squared and summed.

        Raises:
            AdapterError: optimizer steps are made, but ranks are not handed out.
        """
        assert isinstance(config, AdaLoraConfig)
        layers = _layers(adapters)
        _require_driven(layers.values())
        if not config.orth_reg_weight:
            return None
        norms = []
        for layer in layers.values():
            A, B = wide(layer.lora_A), wide(layer.lora_B)
            with torch.autocast(A.device.type, enabled=False):  # bfloat16 would round 1 ± 0.004 to 1
                norms += [_from_identity(A @ A.T), _from_identity(B.T @ B)]
        return config.orth_reg_weight * torch.stack([norm.to(norms[0].device) for norm in norms]).mean()

    @classmethod
    def before_training(cls, config: PeftConfig, adapters: Mapping[str, Adapter], total_steps: int) -> None:
        """Fills in ``total_step`` where it is not set.

        Raises:
            ConfigError: the schedule leaves no step to hand out ranks in.
        """
        assert isinstance(config, AdaLoraConfig)
        total = total_steps if config.total_step is None else config.total_step
        faults = config.schedule_faults(total)
        if faults:
            raise ConfigError("\n".join(["AdaLoRA cannot be trained so:", *(f"  - {fault}" for fault in faults)]))
        config.total_step = total
        plan = _schedule(config, _layers(adapters))
        if plan.end > total_steps and plan.initial > plan.target:
            log.warning(
                "AdaLoRA: the ranks reach their target at step %s, but this run ends at step %s; leave total_step out, "
                "and the trainer fills it in",
                plan.end,
                total_steps,
            )

    @classmethod
    @torch.no_grad()
    def after_step(cls, config: PeftConfig, adapters: Mapping[str, Adapter], step: int) -> None:
        """Takes in the step's gradients, and hands out ranks when it is time.

        Raises:
            ConfigError: ``total_step`` is not set.
            AdapterError: there are no gradients, or never were.
        """
        assert isinstance(config, AdaLoraConfig)
        if config.total_step is None:
            raise ConfigError(
                f"update_and_allocate({step}): AdaLoraConfig.total_step is not set, so there is no schedule; set it to "
                "the number of optimizer steps of the run (deltaw's trainer does so by itself)"
            )
        layers = _layers(adapters)
        plan = _schedule(config, layers)
        if step < plan.end or step == 1:  # in a run of one step, that one has to do
            if all(p.grad is None for layer in layers.values() for p in layer.parameters()):
                raise AdapterError(
                    f"update_and_allocate({step}): there are no gradients; call it after optimizer.step() and before "
                    "optimizer.zero_grad()"
                )
            for layer in layers.values():
                layer._weigh(config.beta1, config.beta2)
        weighed = all(layer.importance for layer in layers.values())
        if weighed and (plan.due(step) or step > plan.end):
            masks = most_important([layer._scores() for layer in layers.values()], plan.budget(step))
            for layer, mask in zip(layers.values(), masks, strict=True):
                layer.mask = mask
                layer._apply_mask()
            # of all layers at once: each transfer waits for a GPU
            kept = iter(torch.cat([mask.to(masks[0].device) for mask in masks]).tolist())
            config.rank_pattern = {pattern_key(name): layer._keeps(kept) for name, layer in layers.items()}
        elif step >= plan.end:
            if any(layer.mask is None and layer.pattern is None for layer in layers.values()):
                raise AdapterError(
                    f"update_and_allocate({step}): the ranks were to be settled at step {plan.end}, but it was not "
                    "called before; call it after each optimizer step, from the first one on"
                )
            for layer in layers.values():
                layer._apply_mask()
        for layer in layers.values():
            layer.driven = True
            if step >= plan.end:
                layer.importance.clear()  # the ranks stay as they are from here on

    def training_state(self) -> dict[str, Tensor]:
        """All triplets, also those that a file leaves out, and what is known of their importance."""
        state = {name: parameter.detach() for name, parameter in self.places().items()}
        if self.mask is not None:
            state["mask"] = self.mask
        for name, known in self.importance.items():
            state |= {f"{name}.sensitivity": known.sensitivity, f"{name}.uncertainty": known.uncertainty}
        return state

    @torch.no_grad()
    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self.mask = state.get("mask")
        for name, place in self.places().items():
            place.copy_(state[name])
            if f"{name}.sensitivity" in state:
                known = (state[f"{name}.{part}"].to(place.device) for part in ("sensitivity", "uncertainty"))
                self.importance[name] = Importance(*known)
        self.driven = self.mask is not None or bool(self.importance)

    @classmethod
    def resume(cls, config: PeftConfig, adapters: Mapping[str, Adapter], saved: PeftConfig) -> None:
        """Takes over which triplets were kept. Without a training state the others start as they are here, and what is
        known of their importance is gathered anew."""
        assert isinstance(config, AdaLoraConfig)
        assert isinstance(saved, AdaLoraConfig)
        config.rank_pattern = saved.rank_pattern
        for name, layer in _layers(adapters).items():
            layer.mask = layer._mask_of((saved.rank_pattern or {}).get(pattern_key(name)))
            layer.importance = {}
            layer.driven = layer.mask is not None

    def _weigh(self, beta1: float, beta2: float) -> None:
        for name, parameter in self.places().items():
            if name not in self.importance:
                self.importance[name] = Importance.none_yet(parameter)
            self.importance[name].update(parameter, parameter.grad, beta1, beta2)

    def _scores(self) -> Tensor:
        """(r,)"""
        return triplet_scores(*(self.importance[name].score() for name in ("lora_A", "lora_B", "lora_E")))

    def _apply_mask(self) -> None:
        if self.mask is not None:
            self.mask = self.mask.to(self.lora_E.device)
            self.lora_E.masked_fill_(~self.mask.view(-1, 1), 0.0)

    def _keeps(self, kept: Iterator[bool]) -> list[bool]:
        """Which of the ``init_r`` triplets of the start are in use; ``kept`` gives this layer's mask next."""
        here = [True] * self.init_r if self.pattern is None else self.pattern
        return [present and next(kept) for present in here]

    def _mask_of(self, keeps: list[bool] | None) -> Tensor | None:
        """The mask (r,) that leaves what ``keeps`` says of the ``init_r`` triplets that there were at first; None where
        it says nothing that fits."""
        here = [True] * self.init_r if self.pattern is None else self.pattern
        if keeps is None or len(keeps) != len(here):
            return None
        return torch.tensor([keep for present, keep in zip(here, keeps, strict=True) if present])

    @property
    def neglected(self) -> bool:
        """Whether it was trained without its ranks being handed out."""
        if self.driven or self.pattern is not None or self.began is None:
            return False
        return not torch.equal(self.lora_E, self.began.to(self.lora_E.device))


def _layers(adapters: Mapping[str, Adapter]) -> dict[str, AdaLora]:
    return {name: adapter for name, adapter in adapters.items() if isinstance(adapter, AdaLora)}


def _schedule(config: AdaLoraConfig, layers: Mapping[str, AdaLora]) -> Schedule:
    assert config.total_step is not None
    initial = sum(len(layer.lora_E) for layer in layers.values())
    end = config.total_step - config.tfinal
    return Schedule(initial, config.target_r * len(layers), config.tinit, end, config.deltaT)


def _kept(name: str, mask: Tensor) -> tuple[Any, ...]:
    """Where the triplets of ``mask`` lie in the parameter ``name``."""
    return (slice(None), mask) if name == "lora_B" else (mask,)


def _from_identity(gram: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def _require_driven(layers: Iterable[AdaLora]) -> None:
    """
    Raises:
        AdapterError: one of them was trained without its ranks being handed out.
    """
    name = next((layer.name for layer in layers if layer.neglected), None)
    if name is not None:
        raise AdapterError(
            f"AdaLoRA adapter {name!r} was trained, but its ranks were never handed out, which makes it a LoRA of rank "
            "init_r: call model.update_and_allocate(step) after each optimizer.step() and before zero_grad(), with "
            "step counted from 1; deltaw's trainer does so by itself, any other of transformers with "
            "callbacks=[deltaw.SteeringCallback()]"
        )
