"""What PEFT calls ``base_model``: a model and the named adapters on it, which of them are active, and their
configs.

Any ``nn.Module`` will do. Knows nothing of files, and of merging only that a change of adapters undoes it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.adapters.base import Adapter
from deltaw.adapters.combine import Request
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer, adapters_named, host_layers
from deltaw.adapters.inject import carriers, check_active, inject, remove_adapter, set_active, trained_biases
from deltaw.adapters.registry import adapters_of
from deltaw.adapters.weighted import combined_config, fill_combined
from deltaw.errors import AdapterError, ConfigError, did_you_mean
from deltaw.modules import dtype_of

__all__ = ["AdaptedBase"]

log = logging.getLogger("deltaw")

Flags = list[tuple[nn.Parameter, bool]]


class AdaptedBase(nn.Module):
    """Holds the original model under ``.model``, changed in place, and the adapters' configs by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.prefix = ""
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []
        self.disabled = False

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output; a loss in it has the penalty of the active adapters added while they train."""
        outputs = self.model(*args, **kwargs)
        if self.training and isinstance(getattr(outputs, "loss", None), Tensor) and self.steers:
            self._penalise(outputs, kwargs)  # type: ignore[call-arg] (the decorator hides what it takes)
        return outputs

    @torch.compiler.disable  # it goes through all layers, which a compiler would unroll
    def _penalise(self, outputs: Any, kwargs: dict[str, Any]) -> None:
        outputs.loss = self.with_penalty(outputs.loss, _share(self.model, kwargs))

    def add(
        self,
        name: str,
        config: PeftConfig,
        *,
        strict: bool = True,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> Flags:
        """Injects adapter ``name``, not active yet, and freezes the base.

        Args:
            strict: an entry of the config that matches nothing is an error, else a note in the log.
            autocast_adapter_dtype: float32 masters over a half-precision base, else the base's own dtype.

        Returns:
            What was trainable before, for :meth:`take_back`.

        Raises:
            TargetError, ConfigError, AdapterError: nothing was changed.
        """
        if not isinstance(config, PeftConfig):
            kind = f"{type(config).__module__}.{type(config).__name__}"
            raise ConfigError(f"peft_config is a {kind}; use deltaw's own, deltaw.LoraConfig (its fields are PEFT's)")
        if name in self.peft_config:
            raise AdapterError(f"adapter {name!r} already exists; delete_adapter({name!r}) first, or use another name")
        biased = [n for n, c in self.peft_config.items() if getattr(c, "bias", "none") != "none"]
        if biased and getattr(config, "bias", "none") != "none":
            raise AdapterError(
                f"adapter {biased[0]!r} trains the base's biases already, and there is one set of them; "
                "use bias='none' for the other one"
            )
        flags = [(p, p.requires_grad) for p in self.parameters()]
        config = copy.deepcopy(config)  # what is resolved against this model must not narrow the next one
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(self.model, "name_or_path", None) or None
        inject(self.model, config, name, strict=strict, low_cpu_mem_usage=low_cpu_mem_usage)
        if not autocast_adapter_dtype:
            self._in_base_dtype(name)
        self.peft_config[name] = config
        self._set_prefix()
        # layers that were just wrapped take part in what is active and in what is disabled
        self._activate(self.active_adapters, trainable=any(flag for _, flag in flags))
        self._tell_disabled()
        return flags

    def take_back(self, name: str, flags: Flags) -> None:
        """Undoes :meth:`add`."""
        remove_adapter(self.model, name)
        del self.peft_config[name]
        self._set_prefix()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    def _set_prefix(self) -> None:
        """PEFT's prefix of the method that came last."""
        methods = [adapters_of(config) for config in self.peft_config.values()]
        self.prefix = next(iter(methods[-1].values())).prefix if methods else ""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds a new LoRA adapter, a weighted combination of others; it is not active until :meth:`set_adapter`.

        ``"cat"`` and ``"svd"`` give the weighted sum of the updates, exactly and to the best of a rank; ``"linear"``
        and those without ``_svd`` combine A and B apart, which is rough. A negative weight takes an update off. What
        trains whole (``modules_to_save``, rows of tokens) is taken over unweighted from the one adapter that has it.

        Args:
            combination_type: one of :data:`deltaw.adapters.COMBINATIONS`; a single adapter is taken as it is.
            svd_rank: rank of the new adapter, for ``"svd"`` and those with ``_svd``; default: the largest source's.
            svd_clamp: quantile of the new factors' elements beyond which they are clamped.
            svd_full_matrices: accepted for PEFT's sake; the leading vectors are the same.
            svd_driver: cuSOLVER's method, for those with ``_svd`` on CUDA.
            density: share of elements that are kept, in (0, 1], for those that prune.
            majority_sign_method: ``"total"`` or ``"frequency"``, for those that elect signs.

        Raises:
            AdapterError: all that is wrong at once; nothing was changed.
        """
        request = Request(
            adapter_name,
            tuple(adapters),
            tuple(weights),
            combination_type,
            svd_rank,
            svd_clamp,
            svd_driver,
            density,
            majority_sign_method,
        )
        config = combined_config(self.model, self.peft_config, request)
        sources = (adapter for name in adapters for adapter in adapters_named(self.model, name).values())
        masters = any(p.dtype == torch.float32 for adapter in sources for p in adapter.parameters())
        flags = self.add(adapter_name, config, autocast_adapter_dtype=masters)
        try:
            fill_combined(self.model, request)
        except BaseException:
            self.take_back(adapter_name, flags)
            raise

    def _in_base_dtype(self, name: str) -> None:
        for _, carrier in carriers(self.model):
            if isinstance(carrier, HostLayer):
                for parameter in carrier.adapters[name].parameters() if name in carrier.adapters else ():
                    parameter.data = parameter.data.to(carrier.store.dtype)
            elif name in carrier.modules_to_save:
                carrier.modules_to_save[name].to(dtype_of(carrier.original_module))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates one adapter, or several whose updates add up; the others are frozen. Merged ones come out
        first.

        Args:
            inference_mode: freeze the activated ones too.

        Raises:
            AdapterError: no such adapter, one named twice, or several that would steer one training.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self.require(name)
        if len(set(names)) < len(names):
            raise AdapterError(f"set_adapter({names}): an adapter is named twice, which would add its update twice")
        steered = [n for n in names if _steers(self.peft_config[n]) and not self.peft_config[n].inference_mode]
        if len(steered) > 1 and not inference_mode:
            raise AdapterError(
                f"set_adapter({names}): {steered} would train together, and {self.peft_config[steered[0]].method} "
                "steers the training of the whole model; train one at a time, or pass inference_mode=True"
            )
        check_active(self.model, names)
        hosts = [host for _, host in host_layers(self.model)]
        merged = {name for host in hosts for name in host.merged_adapters}
        if merged and merged != set(names):
            log.warning(
                "adapters %s were merged; they are taken out of the base to activate %s",
                sorted(merged),
                names,
            )
            for host in hosts:
                host.unmerge()
        self._activate(names, trainable=not inference_mode)

    def _activate(self, names: list[str], *, trainable: bool) -> None:
        set_active(self.model, names, self.peft_config, trainable=trainable)
        self.active_adapters = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; layers left without one become the base's own layers again.

        Raises:
            AdapterError: no such adapter.
        """
        self.require(adapter_name)
        trainable = any(p.requires_grad for p in self.parameters())
        for _, bias in trained_biases(self.model, self.peft_config[adapter_name]):
            bias.requires_grad_(False)
        remove_adapter(self.model, adapter_name)
        del self.peft_config[adapter_name]
        self._set_prefix()
        if adapter_name not in self.active_adapters:
            return
        left = [name for name in self.active_adapters if name != adapter_name] or list(self.peft_config)[:1]
        log.warning("adapter %r was active and is gone; active now: %s", adapter_name, left or "none")
        self._activate(left, trainable=trainable)

    # --- methods that steer the whole model -----------------------------------------------------------------

    def _steering(self) -> list[tuple[PeftConfig, type[Adapter], dict[str, Adapter]]]:
        """(config, method, layer name -> adapter) of the adapters that train and act on the model as a whole."""
        found = []
        for name in self.active_adapters if self.steers else ():
            adapters = adapters_named(self.model, name)
            method = next((type(adapter) for adapter in adapters.values() if adapter.steers), None)
            if method is not None and any(p.requires_grad for a in adapters.values() for p in a.parameters()):
                found.append((self.peft_config[name], method, adapters))
        return found

    @property
    def steers(self) -> bool:
        """Whether an active adapter is of a method that has a penalty of its own or acts after optimizer steps."""
        return any(_steers(self.peft_config[name]) for name in self.active_adapters)

    def penalty(self) -> Tensor | None:
        """What the active adapters add to the training loss, a scalar; None where they add nothing."""
        steering = [] if self.disabled else self._steering()
        terms = [method.penalty(config, adapters) for config, method, adapters in steering]
        given = [term for term in terms if term is not None]
        return torch.stack(given).sum() if given else None

    def with_penalty(self, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """``loss`` and the penalty of the active adapters.

        Args:
            share: how much of the batch of one optimizer step the loss is of; the shares of its parts add up to 1, so
                that accumulated gradients hold the penalty once.
        """
        penalty = self.penalty()
        return loss if penalty is None else loss + (penalty * share).to(loss)

    def before_training(self, total_steps: int) -> None:
        """Tells the active adapters how many optimizer steps there will be; a trainer calls it before the first.

        Raises:
            ConfigError: a method cannot be trained so.
        """
        for config, method, adapters in self._steering():
            method.before_training(config, adapters, total_steps)

    def update_and_allocate(self, global_step: int) -> None:
        """Lets the active adapters act on the model as a whole: call it after each ``optimizer.step()``, before the
        gradients are cleared. For methods that do not steer, it does nothing.

        Args:
            global_step: optimizer steps made so far, with the one that was just made: 1 after the first.
        """
        for config, method, adapters in self._steering():
            method.after_step(config, adapters, global_step)

    # --- switching off ------------------------------------------------------------------------------------------

    def disable_adapter_layers(self) -> None:
        """Switches to the bare base (merged adapters are taken out) until :meth:`enable_adapter_layers`."""
        self.disabled = True
        self._tell_disabled()

    def enable_adapter_layers(self) -> None:
        self.disabled = False
        self._tell_disabled()

    def _tell_disabled(self) -> None:
        for _, carrier in carriers(self.model):
            carrier.enable_adapters(not self.disabled)

    def require(self, name: str) -> None:
        """
        Raises:
            AdapterError: there is no adapter ``name``.
        """
        if name not in self.peft_config:
            there = list(self.peft_config)
            raise AdapterError(f"no adapter {name!r}; there are {there}{did_you_mean(str(name), there)}")


def _steers(config: PeftConfig) -> bool:
    return any(method.steers for method in adapters_of(config).values())


#: transformers' losses that predict the next token: the first label of a row is not among their items
_NEXT_TOKEN = ("ForCausalLM", "ForConditionalGeneration")


def _share(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """How much of an optimizer step's batch a call is of, by the items that a transformers model averages its loss
    over."""
    whole, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels", kwargs.get("labels"))
    if whole is None or not isinstance(labels, Tensor):
        return 1.0
    shifts = getattr(model, "loss_type", None) in _NEXT_TOKEN and "shift_labels" not in kwargs
    if shifts and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        labels = labels[..., 1:]
    return (labels != -100).sum() / (whole.to(labels.device) if isinstance(whole, Tensor) else whole)
