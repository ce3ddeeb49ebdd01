"""The methods, by PEFT's names: a new method is one new file and one line in each table here."""

from __future__ import annotations

from deltaw.adapters.base import Adapter
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.lora import Lora, LoraConfig
from deltaw.errors import ConfigError, did_you_mean

__all__ = ["ADAPTERS", "CONFIGS", "adapter_class", "config_class"]

ADAPTERS: dict[str, type[Adapter]] = {"LORA": Lora}
CONFIGS: dict[str, type[PeftConfig]] = {"LORA": LoraConfig}


def _known(peft_type: str) -> str:
    name = str(getattr(peft_type, "value", peft_type))
    if name not in ADAPTERS:
        raise ConfigError(
            f"peft_type {name!r} is not a method of deltaw (it has {', '.join(ADAPTERS)}){did_you_mean(name, ADAPTERS)}"
        )
    return name


def adapter_class(peft_type: str) -> type[Adapter]:
    """The adapter of a method.

    Raises:
        ConfigError: no such method.
    """
    return ADAPTERS[_known(peft_type)]


def config_class(peft_type: str) -> type[PeftConfig]:
    """The config of a method.

    Raises:
        ConfigError: no such method.
    """
    return CONFIGS[_known(peft_type)]
