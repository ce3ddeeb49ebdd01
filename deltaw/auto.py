"""``AutoPeftModel`` and its siblings: an adapter's folder -> the base that it names, with the adapter on it.

The class of transformers that loads the base follows the task, or what the config says of the base's class. Knows
nothing of layers.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import transformers

from deltaw.adapters import PeftConfig, TaskType
from deltaw.adapters.config import BASE_CLASSES, HUB_KWARGS, find_file
from deltaw.errors import AdapterError, CheckpointError
from deltaw.loading import quantized_arguments, resolve_model
from deltaw.model import PeftModel
from deltaw.tasks import TASK_CLASSES

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]

log = logging.getLogger("deltaw")

#: packages whose classes a config may name in ``auto_mapping``: a file must not choose what is imported
TRUSTED = ("transformers",)
#: arguments of ``PeftModel.from_pretrained``; the others go to the base's
ADAPTER_KWARGS = ("autocast_adapter_dtype", "low_cpu_mem_usage")


class AutoPeftModel:
    """Loads the base that an adapter's config names, and the adapter on it; of the class that fits its task."""

    task: ClassVar[TaskType | None] = None

    def __init__(self) -> None:
        raise AdapterError(f"use {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        import_allowlist: Sequence[str] = TRUSTED,
        **kwargs: Any,
    ) -> PeftModel:
        """The adapter in a folder (or hub id), on the base that it was made for.

        A tokenizer beside the adapter that knows more tokens than the base has embeddings makes the base grow, as it
        did before training.

        Args:
            is_trainable: go on training the adapter.
            revision: of the adapter; the base's is in the config.
            import_allowlist: packages from which a config without a task may name the base's class.
            kwargs: arguments of the base's ``from_pretrained`` (``dtype``, ``device_map``, ...), of the hub
                (``token``, ``cache_dir``, ...), and ``autocast_adapter_dtype``, ``low_cpu_mem_usage``.

        Raises:
            CheckpointError: no adapter there, or one that does not say what its base is.
            AdapterError: the adapter is for another task.
            ModelError: the base cannot be found.
        """
        where = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        ours = {key: kwargs.pop(key) for key in ADAPTER_KWARGS if key in kwargs}
        if revision is not None:
            hub["revision"] = revision
        config = config or PeftConfig.from_pretrained(where, subfolder=subfolder, **hub)
        task = config.task_type or cls.task
        if cls.task is not None and task != cls.task:
            raise AdapterError(
                f"{cls.__name__}: the adapter at {str(where)!r} has task_type {task!s}; "
                f"use Auto{TASK_CLASSES[str(task)].__name__}"
            )
        name = config.base_model_name_or_path
        if not name:
            raise CheckpointError(
                f"the adapter at {str(where)!r} does not name its base (base_model_name_or_path); load the base "
                f"yourself, then PeftModel.from_pretrained(base, {str(where)!r})"
            )
        kind = _base_class(config, task, str(where), import_allowlist)
        base_revision = {} if config.revision is None else {"revision": config.revision}
        folder = resolve_model(name)
        kwargs |= quantized_arguments(folder, kwargs.pop("quantization_config", None), **base_revision, **kwargs)
        base = kind.from_pretrained(folder, **base_revision, **kwargs)
        _grow_vocabulary(base, where, hub)
        made = PeftModel if task is None else TASK_CLASSES[str(task)]
        return made.from_pretrained(base, where, adapter_name, is_trainable, config, subfolder=subfolder, **ours, **hub)


def _base_class(config: PeftConfig, task: TaskType | str | None, where: str, trusted: Sequence[str]) -> Any:
    if task is not None:
        return getattr(transformers, BASE_CLASSES[str(task)])
    mapping = config.auto_mapping or {}
    library, kind = str(mapping.get("parent_library", "")), str(mapping.get("base_model_class", ""))
    if not library or not kind:
        raise CheckpointError(
            f"the adapter at {where!r} says neither its task_type nor the class of its base (auto_mapping); load it "
            "with the class for its task, such as AutoPeftModelForCausalLM"
        )
    if not any(library == name or library.startswith(f"{name}.") for name in trusted):
        raise CheckpointError(
            f"the adapter at {where!r} wants {kind} imported from {library!r}, and a file must not choose what code "
            f"runs here; if you trust it, pass import_allowlist=[{library!r}]"
        )
    return getattr(importlib.import_module(library), kind)


def _grow_vocabulary(base: Any, where: str | os.PathLike[str], hub: dict[str, Any]) -> None:
    """Gives ``base`` as many embeddings as the tokenizer beside the adapter has tokens, if that is more."""
    try:
        find_file(where, "tokenizer_config.json", None, dict(hub))
    except CheckpointError:
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, **hub)
    embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    if embeddings is not None and len(tokenizer) > embeddings.weight.shape[0]:
        log.info("the adapter's tokenizer has %d tokens: the base grows to that", len(tokenizer))
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task = TaskType.FEATURE_EXTRACTION
