"""``PeftModel``: a base model and its adapters, with PEFT's methods, names and parameter paths.

``model.base_model.model`` is the original model, changed in place. Saving is ``checkpoint``'s, merging ``merge``'s.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from deltaw import checkpoint, merge
from deltaw.adapters import PeftConfig, adapter_class, host_layers, inject, remove_adapter, set_active, trained_biases
from deltaw.adapters.inject import carriers
from deltaw.card import write_card
from deltaw.errors import AdapterError, CheckpointError, did_you_mean

__all__ = ["AdaptedBase", "PeftModel", "get_peft_model"]

log = logging.getLogger("deltaw")

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED_NAMES = frozenset(dir(nn.ModuleDict))  # nn.ModuleDict refuses keys that are attributes of its own


def check_name(name: str) -> str:
    """``name`` if an adapter may be called so.

    Raises:
        AdapterError: it would not be safe as a folder or as a module's name.
    """
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name!r}: use letters, digits, '_' and '-', starting with a letter or digit, at most 64"
        )
    if name in RESERVED_NAMES or name == "__base__":
        raise AdapterError(f"adapter name {name!r} is reserved by torch; choose another, e.g. {name + '_1'!r}")
    return name


class AdaptedBase(nn.Module):
    """What PEFT calls ``base_model``: holds the original model under ``.model``, and all adapters' configs."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []

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


class PeftModel(nn.Module):
    """A base model with any number of named adapters, one or several of them active.

    Args:
        model: the base; its layers are wrapped in place.
        peft_config: the first adapter's config.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: make adapter tensors on the meta device, to be filled by a load.

    Raises:
        TargetError, ConfigError, AdapterError: the base is then as it was before.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        strict: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(model, PeftModel):
            raise AdapterError("this model has adapters already; use model.add_adapter(name, config) or load_adapter()")
        if any(True for _ in host_layers(model)):
            raise AdapterError("this model has adapters injected already; unload them, or keep using inject_adapter_in_model")
        check_name(adapter_name)
        if peft_config.base_model_name_or_path is None:
            peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
        inject(model, peft_config, adapter_name, strict=strict, low_cpu_mem_usage=low_cpu_mem_usage)
        self.base_model = AdaptedBase(model, adapter_class(str(peft_config.peft_type)).prefix)
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names"}
        # transformers asks this of a quantized model before it trains; on the base it would redirect save_pretrained
        self._hf_peft_config_loaded = True
        self._adapters_disabled = False
        self.peft_config[adapter_name] = peft_config
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        if not autocast_adapter_dtype:
            self._cast_adapter(adapter_name)
        if getattr(model, "is_gradient_checkpointing", False):
            self._feed_gradient()

    # --- the model inside ---------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """The original model (its layers carry the adapters)."""
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names") is not None:
            raise AdapterError("adapter_names: batches that mix adapters are not supported yet; use set_adapter()")
        kwargs.pop("adapter_names", None)
        return self.base_model.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> config."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The first active adapter."""
        return self.active_adapters[0] if self.active_adapters else next(iter(self.peft_config))

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {entry for c in self.peft_config.values() for entry in getattr(c, "modules_to_save", None) or []}
        return names or None

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Turns activation checkpointing on; the reentrant kind needs an input that carries a gradient, and gets it."""
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]
        if kwargs["use_reentrant"]:
            self._feed_gradient()

    def _feed_gradient(self) -> None:
        model = self.get_base_model()
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()  # type: ignore[operator]

    # --- adapters -----------------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False) -> None:
        """Adds another adapter; it is not active until :meth:`set_adapter`.

        Raises:
            AdapterError: the name exists or is not allowed, or a second adapter would train the base's biases.
            TargetError, ConfigError: nothing was changed.
        """
        self._add(adapter_name, peft_config, strict=True, low_cpu_mem_usage=low_cpu_mem_usage)

    def _add(self, name: str, config: PeftConfig, *, strict: bool, low_cpu_mem_usage: bool) -> None:
        check_name(name)
        if name in self.peft_config:
            raise AdapterError(f"adapter {name!r} already exists; delete_adapter({name!r}) first, or use another name")
        biased = [n for n, c in self.peft_config.items() if getattr(c, "bias", "none") != "none"]
        if getattr(config, "bias", "none") != "none" and biased:
            raise AdapterError(
                f"adapter {biased[0]!r} trains the base's biases already, and there is one set of them; use bias='none'"
            )
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(self.get_base_model(), "name_or_path", None) or None
        inject(self.get_base_model(), config, name, strict=strict, low_cpu_mem_usage=low_cpu_mem_usage)
        self.peft_config[name] = config
        self._refresh()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates one adapter, or several whose updates add up; everything else is frozen.

        Args:
            inference_mode: freeze the activated ones too.

        Raises:
            AdapterError: no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._known(name)
        set_active(self.get_base_model(), names, self.peft_config, trainable=not inference_mode)
        self.base_model.active_adapters = names

    def _refresh(self) -> None:
        """Re-applies the active set to layers that were just wrapped or freed."""
        training = any(p.requires_grad for p in self.parameters())
        self.set_adapter([n for n in self.active_adapters if n in self.peft_config], inference_mode=not training)
        for _, carrier in carriers(self):
            carrier.enable_adapters(not self._adapters_disabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; layers left without one become the base's own layers again.

        Raises:
            AdapterError: no such adapter.
        """
        self._known(adapter_name)
        remove_adapter(self.get_base_model(), adapter_name)
        del self.peft_config[adapter_name]
        if adapter_name in self.active_adapters:
            left = [name for name in self.active_adapters if name != adapter_name] or list(self.peft_config)[:1]
            if left:
                log.warning("adapter %r was active and is gone; active now: %s", adapter_name, left)
            self.base_model.active_adapters = left
        self._refresh()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model is the bare base (merged adapters are taken out first)."""
        if any(trained_biases(self.get_base_model(), c) for c in self.peft_config.values()):
            log.warning("the base's biases were trained (bias != 'none'), so the base inside this block is not the original")
        before = self._adapters_disabled
        self._set_disabled(True)
        try:
            yield
        finally:
            self._set_disabled(before)

    def disable_adapter_layers(self) -> None:
        """Switches to the bare base until :meth:`enable_adapter_layers`."""
        self._set_disabled(True)

    def enable_adapter_layers(self) -> None:
        self._set_disabled(False)

    def _set_disabled(self, disabled: bool) -> None:
        self._adapters_disabled = disabled
        for _, carrier in carriers(self):
            carrier.enable_adapters(not disabled)

    def _known(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterError(f"no adapter {name!r}; there are {list(self.peft_config)}{did_you_mean(name, self.peft_config)}")

    def _cast_adapter(self, name: str) -> None:
        """autocast_adapter_dtype=False: the adapter's tensors take the base's dtype instead of float32."""
        for _, host in host_layers(self):
            if name in host.adapters:
                for parameter in host.adapters[name].parameters():
                    parameter.data = parameter.data.to(host.store.dtype)

    # --- counting -----------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; tied weights count once."""
        trainable = total = 0
        for parameter in self.parameters():
            total += parameter.numel()
            trainable += parameter.numel() if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """PEFT's line, to the character."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # --- files --------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes each adapter in PEFT's files: ``default`` at the root, others in a folder of their name.

        Raises:
            CheckpointError: pickles are asked for, or the target is a file.
            AdapterError: an adapter in ``selected_adapters`` does not exist.
        """
        root = Path(save_directory)
        if root.is_file():
            raise CheckpointError(f"cannot save an adapter into {root}: it is a file, not a folder")
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False would write a pickle; deltaw writes safetensors only")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            self._known(name)
        if not is_main_process:
            return
        for name in names:
            folder = root if name == "default" else root / name
            checkpoint.save_adapter(
                self.get_base_model(), name, self.peft_config[name], folder, embeddings=save_embedding_layers
            )
            write_card(folder, self.peft_config[name])

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Puts a saved adapter on ``model``. Loading is strict; if it fails the model is as it was before.

        Args:
            model_id: folder (or hub id) with PEFT's files.
            is_trainable: go on training it; otherwise everything is frozen.

        Raises:
            CheckpointError, TargetError, ConfigError: the adapter does not fit.
        """
        if isinstance(model, PeftModel):
            raise AdapterError("this model has adapters already; use model.load_adapter(folder, adapter_name=...)")
        tensors = checkpoint.read_tensors(model_id, subfolder=subfolder, **kwargs)
        config = config or PeftConfig.from_pretrained(model_id, subfolder=subfolder, **kwargs)
        config.inference_mode = not is_trainable
        peft_model = cls(
            model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage, strict=False
        )
        try:
            checkpoint.load_tensors(model, adapter_name, config, tensors, str(model_id))
        except BaseException:
            remove_adapter(model, adapter_name)
            raise
        if is_trainable:
            peft_model.train(model.training)
        else:
            peft_model.eval()
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads another saved adapter beside those that are here; it is not active until :meth:`set_adapter`.

        Raises:
            CheckpointError, TargetError, ConfigError, AdapterError: nothing was changed.
        """
        tensors = checkpoint.read_tensors(model_id, subfolder=subfolder, **kwargs)
        config = PeftConfig.from_pretrained(model_id, subfolder=subfolder, **kwargs)
        config.inference_mode = not is_trainable
        self._add(adapter_name, config, strict=False, low_cpu_mem_usage=low_cpu_mem_usage)
        try:
            checkpoint.load_tensors(self.get_base_model(), adapter_name, config, tensors, str(model_id))
        except BaseException:
            remove_adapter(self.get_base_model(), adapter_name)
            del self.peft_config[adapter_name]
            self._refresh()
            raise

    # --- merging ------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Folds the active (or named) adapters into the base weights, keeping a copy for a bitwise unmerge.

        Args:
            safe_merge: accepted for PEFT's sake; results are always checked before they are written.

        Raises:
            MergeError: merged already, unknown, or not finite; the base is then unchanged.
        """
        merge.merge_adapters(self.get_base_model(), adapter_names or self.active_adapters)

    def unmerge_adapter(self, adapter_names: list[str] | None = None) -> None:
        """Takes merged adapters (default: all) out again; with none left the base is bitwise what it was."""
        merge.unmerge_adapters(self.get_base_model(), adapter_names)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base with the active (or named) adapters folded in, as a plain model; no copy of it is made.

        Raises:
            MergeError: unknown adapters, or a result that is not finite.
        """
        return merge.unload(self.get_base_model(), adapter_names or self.active_adapters, merge=True)

    def unload(self) -> nn.Module:
        """The base as it was before any adapter, as a plain model."""
        return merge.unload(self.get_base_model(), self.active_adapters, merge=False)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Puts a new, trainable adapter on ``model`` and freezes the rest; B is zero, so nothing changes yet.

    Raises:
        TargetError: what ``target_modules`` and its companions fail to match, with the nearest names.
        ConfigError, AdapterError: the model is then as it was before.
    """
    if mixed:
        raise AdapterError("mixed=True: adapters of different methods share one PeftModel here; leave it out")
    if revision is not None:
        peft_config.revision = revision
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


