"""``PeftModel``: a base model and its adapters, with PEFT's methods, names and parameter paths.

``model.base_model.model`` is the original model, changed in place. Saving is ``checkpoint``'s, merging
``merge``'s.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from deltaw import checkpoint, merge
from deltaw.adapters import AdaptedBase, PeftConfig, host_layers, trained_biases
from deltaw.adapters.running import Running, let_gradients_in
from deltaw.card import write_card
from deltaw.errors import AdapterError, CheckpointError
from deltaw.guises import Guised
from deltaw.modules import parameter_sizes
from deltaw.statedict import refill
from deltaw.status import get_layer_status, get_model_status

__all__ = ["PeftModel", "get_peft_model"]

log = logging.getLogger("deltaw")


class PeftModel(Guised, Running):
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
            raise AdapterError(
                "this model has adapters injected already; unload them, or keep using inject_adapter_in_model"
            )
        self.base_model = AdaptedBase(model)
        self.training = model.training
        self.base_model.add(
            adapter_name,
            peft_config,
            strict=strict,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        let_gradients_in(model)
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names"}
        # transformers asks a quantized model for this before it trains; on the base it would redirect
        # save_pretrained
        self._hf_peft_config_loaded = True

    # --- the model inside -----------------------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The original model (its layers carry the adapters)."""
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> config."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str:
        """The first active adapter.

        Raises:
            AdapterError: every adapter was deleted.
        """
        if not self.active_adapters:
            raise AdapterError("no adapter is active: all were deleted; add one with add_adapter() or load_adapter()")
        return self.active_adapters[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {entry for c in self.peft_config.values() for entry in getattr(c, "modules_to_save", None) or []}
        return names or None

    # --- adapters -------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds another adapter; it is not active until :meth:`set_adapter`.

        Raises:
            AdapterError: the name exists or is not allowed, or a second adapter would train the base's
                biases.
            TargetError, ConfigError: nothing was changed.
        """
        self.base_model.add(
            adapter_name,
            peft_config,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activates one adapter, or several whose updates add up; the others are frozen. Merged ones come out
        first.

        Args:
            inference_mode: freeze the activated ones too.

        Raises:
            AdapterError: no such adapter, or one named twice.
        """
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; layers left without one become the base's own layers again.

        Raises:
            AdapterError: no such adapter.
        """
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model is the bare base (merged adapters are taken out first)."""
        if any(trained_biases(self.get_base_model(), config) for config in self.peft_config.values()):
            log.warning("bias != 'none': the base's biases were trained, so this is not the original base")
        before = self.base_model.disabled
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if not before:
                self.base_model.enable_adapter_layers()

    # --- counting -------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; tied weights count once, and weights in 4 bits as what they stand for."""
        sizes = parameter_sizes(self)
        return sum(size for parameter, size in sizes.items() if parameter.requires_grad), sum(sizes.values())

    def print_trainable_parameters(self) -> None:
        """PEFT's line, to the character."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    get_layer_status = get_layer_status
    get_model_status = get_model_status

    # --- files ----------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike[str] | None = None,
        convert_to_lora: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes each adapter in PEFT's files: ``default`` at the root, others in a folder of their name.

        Args:
            path_initial_model_for_weight_conversion: accepted for PEFT's sake; the start of PiSSA and OLoRA is known
                here, so that the folder is not read.
            convert_to_lora: write PiSSA and OLoRA as LoRA of twice the rank over the unchanged base. False writes them
                as PEFT does, and whoever reads that repeats the decomposition of the base.

        Raises:
            CheckpointError: pickles are asked for, the target is a file, or an adapter that started from a random
                decomposition is to be written unconverted.
            AdapterError: an adapter in ``selected_adapters`` does not exist.
        """
        if path_initial_model_for_weight_conversion is not None and not convert_to_lora:
            raise CheckpointError("convert_to_lora=False and path_initial_model_for_weight_conversion contradict")
        root = Path(save_directory)
        if root.is_file():
            raise CheckpointError(f"cannot save an adapter into {root}: it is a file, not a folder")
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False would write a pickle; deltaw writes safetensors only")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            self.base_model.require(name)
        if not is_main_process:
            return
        for name in names:
            folder = root if name == "default" else root / name
            config = self.peft_config[name]
            if config.task_type is None and config.auto_mapping is None:  # then AutoPeftModel goes by the base's class
                kind = type(self.get_base_model())
                config = copy.copy(config)
                config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            checkpoint.save_adapter(
                self.get_base_model(),
                name,
                config,
                folder,
                embeddings=save_embedding_layers,
                convert=convert_to_lora,
            )
            write_card(folder, config)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Writes a card into ``output_dir`` unless there is one; transformers' Trainer calls it after its own."""
        write_card(Path(output_dir), self.active_peft_config)

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
        config = config or PeftConfig.from_pretrained(model_id, subfolder=subfolder, **kwargs)
        tensors = checkpoint.read_tensors(model_id, subfolder=subfolder, **kwargs)
        config.inference_mode = not is_trainable
        flags = [(p, p.requires_grad) for p in model.parameters()]
        peft_model = (_class_for(config) if cls is PeftModel else cls)(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            strict=False,
        )
        try:
            checkpoint.load_tensors(model, adapter_name, config, tensors, str(model_id))
        except BaseException:
            peft_model.base_model.take_back(adapter_name, flags)
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
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        """Loads another saved adapter beside those that are here; it is not active until :meth:`set_adapter`.

        Under the name of an adapter that is here, it fills that one, which goes on as it is, active and trainable or
        not; the file must be of the same kind.

        Raises:
            CheckpointError, TargetError, ConfigError, AdapterError: nothing was changed.
        """
        config = PeftConfig.from_pretrained(model_id, subfolder=subfolder, **kwargs)
        tensors = checkpoint.read_tensors(model_id, subfolder=subfolder, **kwargs)
        if adapter_name in self.peft_config:
            refill(self.get_base_model(), adapter_name, self.peft_config[adapter_name], config, tensors, str(model_id))
            return
        config.inference_mode = not is_trainable
        flags = self.base_model.add(
            adapter_name,
            config,
            strict=False,
            low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        try:
            checkpoint.load_tensors(self.get_base_model(), adapter_name, config, tensors, str(model_id))
        except BaseException:
            self.base_model.take_back(adapter_name, flags)
            raise

    # --- merging --------------------------------------------------------------------------------------------

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
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """The base with the active (or named) adapters folded in, as a plain model; no copy of it is made.

        Args:
            dequantize: a base in 4 bits becomes one in the dtype that it was quantized from: its layers are plain ones,
                nothing is rounded to 4 bits again, and what is saved is an ordinary model.

        Raises:
            MergeError: unknown adapters, or a result that is not finite.
        """
        names = adapter_names or self.active_adapters
        return merge.unload(self.get_base_model(), names, merge=True, dequantize=dequantize)

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
    return _class_for(peft_config)(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _class_for(config: PeftConfig) -> type[PeftModel]:
    """The class for the task of ``config``."""
    from deltaw.tasks import TASK_CLASSES  # they derive from the class here

    return TASK_CLASSES.get(str(getattr(config, "task_type", None)), PeftModel)
