"""What PEFT calls ``base_model``: a model and the named adapters on it, which of them are active, and their
configs.

Any ``nn.Module`` will do. Knows nothing of files, and of merging only that a change of adapters undoes it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from deltaw.adapters.config import PeftConfig
from deltaw.adapters.host import HostLayer, host_layers
from deltaw.adapters.inject import carriers, inject, remove_adapter, set_active, trained_biases
from deltaw.adapters.registry import adapter_class
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
        return self.model(*args, **kwargs)

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
        self.prefix = adapter_class(str(config.peft_type)).prefix
        # layers that were just wrapped take part in what is active and in what is disabled
        self._activate(self.active_adapters, trainable=any(flag for _, flag in flags))
        self._tell_disabled()
        return flags

    def take_back(self, name: str, flags: Flags) -> None:
        """Undoes :meth:`add`."""
        remove_adapter(self.model, name)
        del self.peft_config[name]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

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
            AdapterError: no such adapter, or one named twice.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self.require(name)
        if len(set(names)) < len(names):
            raise AdapterError(f"set_adapter({names}): an adapter is named twice, which would add its update twice")
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
        if adapter_name not in self.active_adapters:
            return
        left = [name for name in self.active_adapters if name != adapter_name] or list(self.peft_config)[:1]
        log.warning("adapter %r was active and is gone; active now: %s", adapter_name, left or "none")
        self._activate(left, trainable=trainable)

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
