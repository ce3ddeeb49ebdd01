"""What every adapter config has in common, and how it is read from and written to ``adapter_config.json``.

A config is a plain dataclass with PEFT's field names. Fields of PEFT's that a method here does not support
are known by name (``unsupported``): at its default such a field is silent, away from it the config is
refused. Knows nothing of layers.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import logging
import os
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Self

from deltaw.errors import CheckpointError, ConfigError, did_you_mean

__all__ = ["BASE_CLASSES", "CONFIG_NAME", "PeftConfig", "PeftType", "TaskType"]

CONFIG_NAME = "adapter_config.json"

log = logging.getLogger("deltaw")


class PeftType(enum.StrEnum):
    """The methods that deltaw knows, under PEFT's names."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    LOHA = "LOHA"
    LOKR = "LOKR"


class TaskType(enum.StrEnum):
    """What the adapted model is for, under PEFT's names."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


#: ``task_type`` -> the class of transformers that loads its base
BASE_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclasses.dataclass
class PeftConfig:
    """Fields that every method shares.

    Args:
        task_type: what the adapted model is for.
        base_model_name_or_path: the base this adapter belongs to; filled in when the adapter is made.
        revision: revision of the base on the hub.
        inference_mode: load for inference, nothing trainable.
        peft_version: version of the program that wrote the file.
        auto_mapping: PEFT's record of a base class outside transformers' auto classes; kept as read.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = dataclasses.field(default=None, init=False)
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    #: PEFT's fields that this method does not act on: they must stay at their default
    unsupported: ClassVar[tuple[str, ...]] = ()
    #: fields that are never written to a file
    unsaved: ClassVar[tuple[str, ...]] = ()
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    @property
    def method(self) -> str:
        """The key of this config's adapters in the registry: ``peft_type``, or a variant of it."""
        return str(self.peft_type)

    def __post_init__(self) -> None:
        if isinstance(self.task_type, str) and self.task_type in TaskType.__members__:
            self.task_type = TaskType(str(self.task_type))
        faults = self.mistyped() or self.faults()
        if faults:
            raise ConfigError(f"{type(self).__name__}:\n" + "\n".join(f"  - {fault}" for fault in faults))

    def mistyped(self) -> list[str]:
        """Values that are not of their field's type, one line each."""
        hints = _hints(type(self))
        return [
            f"{f.name}={getattr(self, f.name)!r}: {_words(hints[f.name])} is needed"
            for f in dataclasses.fields(self)
            if not _fits(getattr(self, f.name), hints[f.name])
        ]

    def faults(self) -> list[str]:
        """All that is wrong with values of the right types, one line each; a method adds its own."""
        faults = []
        if self.task_type is not None and self.task_type not in list(TaskType):
            names = [t.value for t in TaskType]
            faults.append(
                f"task_type={self.task_type!r}: use one of {', '.join(names)}"
                f"{did_you_mean(str(self.task_type).upper(), names)}"
            )
        for field in dataclasses.fields(self):
            if field.name in self.unsupported:
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                value = getattr(self, field.name)
                if value != default and value:
                    faults.append(
                        f"{field.name}={value!r}: a setting of PEFT's that deltaw does not support; "
                        f"leave it at its default {default!r}"
                    )
        return faults

    # --- dictionaries ---------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON values; sets become sorted lists."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "config") -> Self:
        """Builds the config from a file's values.

        Fields unknown to deltaw and PEFT 0.21 that hold nothing (null, false, empty) are reported in the log;
        one that holds a value may change the arithmetic and is refused. All faults are reported at once.

        Raises:
            ConfigError: a value that cannot be honoured.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        faults, ours = [], {}
        for key, value in values.items():
            if key == "peft_type":
                continue
            if key in known:
                ours[key] = value
            elif value:
                faults.append(
                    f"{key}={value!r}: neither deltaw nor PEFT 0.21 knows this setting, "
                    f"and it may change the result"
                    f"{did_you_mean(key, known)}"
                )
            else:
                log.warning("%s: unknown setting %s=%r has no effect here", where, key, value)
        config = None
        try:
            config = cls(**ours)
        except ConfigError as error:
            faults += [line.removeprefix("  - ") for line in str(error).splitlines()[1:]]
        if config is None or faults:
            raise ConfigError(f"cannot use {where}:\n" + "\n".join(f"  - {fault}" for fault in faults))
        return config

    # --- files ----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], **values: Any) -> None:
        """Writes ``adapter_config.json`` with every field PEFT 0.21 writes, keys sorted, atomically.

        Args:
            values: written in place of the config's own.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        merged = {**self.to_dict(), **values}
        # only the top level is sorted: the first key of a pattern that matches wins, so their order means
        # something
        written = {key: merged[key] for key in sorted(merged) if key not in self.unsaved}
        part = folder / f".{CONFIG_NAME}.{os.getpid()}.part"
        try:
            part.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
            os.replace(part, folder / CONFIG_NAME)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftConfig:
        """Reads the config of an adapter folder (or hub id); the class follows its ``peft_type``.

        Args:
            subfolder: folder of the adapter inside the repository.
            kwargs: fields to set on the config that was read, and ``revision``/``token``/``cache_dir`` for
                the hub.

        Raises:
            CheckpointError: no such file, or a file that is not an adapter config.
        """
        from deltaw.adapters.registry import config_class

        path = Path(find_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder, kwargs))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}); the adapter folder is damaged") from error
        if not isinstance(values, dict) or not values.get("peft_type"):
            raise CheckpointError(f"{path} has no 'peft_type': it does not describe an adapter")
        config = config_class(values["peft_type"]).from_dict(values, where=str(path))
        for key, value in kwargs.items():
            if not hasattr(config, key):
                raise ConfigError(f"{key!r} is not a field of {type(config).__name__}")
            setattr(config, key, value)
        config.__post_init__()
        return config


HUB_KWARGS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def find_file(name: str | os.PathLike[str], filename: str, subfolder: str | None, kwargs: dict[str, Any]) -> str:
    """Local path of ``filename`` in an adapter folder, or fetched from the hub; takes the hub's keys out of
    kwargs.

    Raises:
        CheckpointError: the file is in neither place.
    """
    hub = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
    folder = Path(name).expanduser()
    if subfolder:
        folder = folder / subfolder
    if folder.is_dir() or Path(name).expanduser().is_dir():
        if (folder / filename).is_file():
            _require_inside(folder / filename, Path(name).expanduser())
            return str(folder / filename)
        here = sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else []
        raise CheckpointError(f"{folder} holds no {filename}; it holds {', '.join(here) or 'nothing'}")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(str(name), filename, subfolder=subfolder, **hub)
    except Exception as error:  # the hub client raises many kinds; the cure is the same for each
        raise CheckpointError(
            f"no adapter at {str(name)!r}: not a folder here, and the hub gave no {filename} ({type(error).__name__})"
        ) from error


def _require_inside(file: Path, folder: Path) -> None:
    """A file of an adapter must lie in its folder, links followed: what comes from elsewhere may point anywhere.

    The hub's cache keeps its files in ``blobs``, beside the ``snapshots`` that link to them.
    """
    place, home = file.resolve(), folder.resolve()
    cached = [home.parents[1] / "blobs"] if len(home.parents) > 1 and home.parent.name == "snapshots" else []
    if not any(place.is_relative_to(one) for one in (home, *cached)):
        raise CheckpointError(
            f"{file} leads out of the adapter's folder, to {place}, and is refused: "
            "if you trust that file, copy it to where the link is"
        )


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, as code or a JSON file gives it, is of a field's declared type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin in (list, set):
        return isinstance(value, origin) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):  # True is an int to Python, not to a reader
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """A field's declared type, to be read."""
    plain = str(hint) if typing.get_origin(hint) else hint.__name__
    return plain.replace("NoneType", "None").replace(f"{__name__}.", "")


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
