"""The keys of a run that describe its adapter, each with the methods that it belongs to.

A key of another method is unset (None); giving it a value is a fault that says whose it is. The keys are named as in
``LoraConfig``, ``AdaLoraConfig``, ``LoHaConfig`` and ``LoKrConfig``. Knows nothing of the rest of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, model_validator

from deltaw.fieldtypes import Init, Int, Layers, Names, Ranks, Targets, lowered, setting
from deltaw.methods import METHODS
from deltaw.presets import DEFAULT_PRESET, PRESETS

__all__ = ["ADAPTER_GROUPS", "AdapterFields", "Fault", "belongs", "methods_of", "preset_for", "ranks"]

DEFAULT_METHOD = "lora"
ADAPTER_GROUPS = ("Adapter", "AdaLoRA", "LoHa and LoKr")

_LORA = tuple(name for name, method in METHODS.items() if method.config == "LoraConfig")
_SCALED = (*_LORA, "adalora")  # those with LoRA's alpha and dropout
_RANKED = (*_LORA, "loha", "lokr")  # those with one rank from start to end
_adapter, _adalora, _lycoris = (partial(setting, group) for group in ADAPTER_GROUPS)
_STANDARD: dict[str, Any] = PRESETS[DEFAULT_PRESET]

#: what a key is called where another method has it under another name
_CALLED = {
    "r": {"adalora": "init_r and target_r"},
    "init_r": dict.fromkeys(_RANKED, "r"),
    "target_r": dict.fromkeys(_RANKED, "r"),
    "lora_alpha": dict.fromkeys(("loha", "lokr"), "alpha"),
    "alpha": dict.fromkeys(_SCALED, "lora_alpha"),
    "lora_dropout": dict.fromkeys(("loha", "lokr"), "rank_dropout"),
    "rank_dropout": dict.fromkeys(_SCALED, "lora_dropout"),
    "init_lora_weights": dict.fromkeys(("loha", "lokr"), "init_weights"),
    "init_weights": dict.fromkeys(_LORA, "init_lora_weights"),
}


class Fault(NamedTuple):
    """One thing wrong with a run's description: the key, its value, why, and how to cure it."""

    key: str
    value: Any
    why: str
    cure: str


class AdapterFields(BaseModel):
    """The adapter of a run: its method and that method's settings."""

    method: Annotated[
        Literal["lora", "rslora", "dora", "adalora", "loha", "lokr", "pissa", "olora"], BeforeValidator(lowered)
    ] = _adapter(DEFAULT_METHOD, "Kind of adapter; deltaw methods says what each is.")
    preset: Literal["standard", "memory_efficient", "high_performance"] = _adapter(
        DEFAULT_PRESET, "Fills rank, alpha, dropout and target_modules; keys you give win."
    )
    target_modules: Targets = _adapter(
        _STANDARD["target_modules"], "Layers to adapt: names, a regular expression, or all-linear."
    )
    exclude_modules: Targets | None = _adapter(None, "Layers to leave out: names or a regular expression.")
    modules_to_save: Names | None = _adapter(None, "Layers to train in full and to save with the adapter.")
    layers_to_transform: Layers | None = _adapter(None, "Numbers of the decoder layers to adapt.")

    r: Int | None = _adapter(_STANDARD["r"], "Rank of the update.", methods=_RANKED, gt=0)
    lora_alpha: Int | None = _adapter(
        _STANDARD["lora_alpha"], "The update is scaled by lora_alpha / r.", methods=_SCALED, gt=0
    )
    lora_dropout: float | None = _adapter(
        _STANDARD["lora_dropout"], "Dropout on the adapter's input.", methods=_SCALED, ge=0, lt=1
    )
    rank_pattern: Ranks | None = _adapter({}, "Ranks that differ: {layer or expression: r}.", methods=_RANKED)
    alpha_pattern: Ranks | None = _adapter({}, "alpha that differ: {layer or expression: alpha}.", methods=_RANKED)
    use_rslora: bool | None = _adapter(
        _STANDARD["use_rslora"], "Scale by lora_alpha / sqrt(r) instead; method rslora.", methods=_LORA
    )
    use_dora: bool | None = _adapter(False, "Weight-decomposed adapters; method dora.", methods=_LORA)
    init_lora_weights: Init | None = _adapter(
        True,
        "How A and B begin: true (Kaiming), gaussian, orthogonal, pissa, pissa_niter_N, olora, loftq.",
        methods=_LORA,
    )
    loftq_config: Ranks | None = _adapter({}, "Of loftq: {loftq_iter: turns, 1 unless given}.", methods=_LORA)
    lora_bias: bool | None = _adapter(False, "Give B a bias of its own.", methods=_LORA)
    bias: Literal["none", "all", "lora_only"] | None = _adapter("none", "Biases to train along.", methods=_SCALED)

    init_r: Int | None = _adalora(24, "Rank of every layer at the start.", methods=["adalora"], gt=0)
    target_r: Int | None = _adalora(16, "Mean rank of a layer at the end.", methods=["adalora"], gt=0)
    tinit: float | None = _adalora(
        0.1, "Steps before pruning begins; below 1, a share of all steps.", methods=["adalora"], ge=0
    )
    tfinal: float | None = _adalora(
        0.3, "Steps after pruning has ended; below 1, a share of all steps.", methods=["adalora"], ge=0
    )
    deltaT: Int | None = _adalora(1, "Steps between two prunings.", methods=["adalora"], gt=0)
    beta1: float | None = _adalora(0.85, "Smoothing of the importance.", methods=["adalora"], gt=0, lt=1)
    beta2: float | None = _adalora(0.85, "Smoothing of its uncertainty.", methods=["adalora"], gt=0, lt=1)
    orth_reg_weight: float | None = _adalora(
        0.5, "Weight of the penalty that keeps P and Q orthogonal.", methods=["adalora"], ge=0
    )

    alpha: Int | None = _lycoris(
        _STANDARD["lora_alpha"], "The update is scaled by alpha / r.", methods=["loha", "lokr"], gt=0
    )
    rank_dropout: float | None = _lycoris(
        0.0, "Probability of dropping a row of the update.", methods=["loha", "lokr"], ge=0, lt=1
    )
    module_dropout: float | None = _lycoris(
        0.0, "Probability of leaving a layer's update out of a step.", methods=["loha", "lokr"], ge=0, lt=1
    )
    init_weights: bool | Literal["lycoris"] | None = _lycoris(
        True, "true begins as the base; lycoris as that library begins.", methods=["loha", "lokr"]
    )
    use_effective_conv2d: bool | None = _lycoris(
        False, "Decompose the kernels of convolutions too.", methods=["loha", "lokr"]
    )
    decompose_both: bool | None = _lycoris(False, "LoKr: make the smaller factor low-rank too.", methods=["lokr"])
    decompose_factor: Int | None = _lycoris(
        -1, "LoKr: size of the smaller factor; -1: as square as can be.", methods=["lokr"], ge=-1
    )
    rank_dropout_scale: bool | None = _lycoris(
        False, "LoKr: divide what rank_dropout leaves by its mean.", methods=["lokr"]
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Keys of other methods are unset; the preset and the method stand in for the rest that was not given."""
        if not isinstance(given, Mapping):
            return given
        name, preset = lowered(given.get("method", DEFAULT_METHOD)), given.get("preset", DEFAULT_PRESET)
        if not isinstance(name, str) or name not in METHODS:
            return given
        foreign = {field: None for field in AdapterFields.model_fields if not belongs(field, name)}
        filled = preset_for(preset, name) if isinstance(preset, str) and preset in PRESETS else {}
        said = {field: value for field, value in given.items() if value is not None or not methods_of(field)}
        return {**foreign, **filled, **METHODS[name].fixes, **said}

    def adapter_faults(self) -> Iterator[Fault]:
        """Keys of another method, and keys that take back what makes the method."""
        chosen = METHODS[self.method]
        for field in AdapterFields.model_fields:
            value = getattr(self, field)
            if value is not None and not belongs(field, self.method):
                called = _CALLED.get(field, {}).get(self.method)
                cure = f"{self.method} has {called}" if called else "leave it out"
                yield Fault(field, value, f"a key of {_and(methods_of(field))}, and method is {self.method!r}", cure)
            elif not chosen.allows(field, value):
                fixed = chosen.fixes[field]
                yield Fault(field, value, f"{chosen.title} is {field}: {_word(fixed)}", "leave it out, or method: lora")
        if self.loftq_config and self.init_lora_weights != "loftq":
            yield Fault("loftq_config", self.loftq_config, "nothing reads it but loftq", "init_lora_weights: loftq")
        if self.method == "loha" and self.init_weights == "lycoris":
            yield Fault("init_weights", "lycoris", "LoHa has no such start, LoKr has", "true, or method: lokr")


def methods_of(field: str) -> tuple[str, ...]:
    """The methods that a key belongs to; empty for a key of all of them, or of none."""
    info = AdapterFields.model_fields.get(field)
    extra = info.json_schema_extra if info is not None else None
    return tuple(extra.get("methods", ())) if isinstance(extra, dict) else ()  # type: ignore[arg-type]


def belongs(field: str, method: str) -> bool:
    """Whether ``method`` reads ``field``."""
    return not methods_of(field) or method in methods_of(field)


def preset_for(preset: str, method: str) -> dict[str, Any]:
    """What a preset, written for LoRA, means for ``method``: the same rank, scale and layers in its own keys."""
    values: dict[str, Any] = dict(PRESETS[preset])
    values |= {"alpha": values["lora_alpha"], **ranks(method, values["r"])}
    return {field: value for field, value in values.items() if belongs(field, method)}


def ranks(method: str, r: int) -> dict[str, int]:
    """The keys that give a method rank ``r``. AdaLoRA begins with half as much again as it keeps, as in its paper."""
    return {"init_r": r * 3 // 2, "target_r": r} if method == "adalora" else {"r": r}


def _and(names: tuple[str, ...]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
