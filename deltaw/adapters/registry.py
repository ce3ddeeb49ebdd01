"""The methods, by PEFT's names: a new method is one new file and one line in each table here."""

from __future__ import annotations

from collections.abc import Mapping

from deltaw.adapters.base import Adapter
from deltaw.adapters.config import PeftConfig
from deltaw.adapters.methods.adalora import AdaLora
from deltaw.adapters.methods.adalora_config import AdaLoraConfig
from deltaw.adapters.methods.adalora_conv import AdaLoraConv
from deltaw.adapters.methods.dora import Dora
from deltaw.adapters.methods.dora_conv import DoraConv
from deltaw.adapters.methods.dora_embedding import DoraEmbedding
from deltaw.adapters.methods.loha import LoHa, LoHaConfig, LoHaConv
from deltaw.adapters.methods.lokr import LoKr, LoKrConfig, LoKrConv
from deltaw.adapters.methods.lora import Lora, LoraConfig
from deltaw.adapters.methods.lora_conv import LoraConv
from deltaw.adapters.methods.lora_embedding import LoraEmbedding
from deltaw.adapters.methods.lora_tied import TiedLora, TiedLoraEmbedding
from deltaw.errors import ConfigError, did_you_mean

__all__ = ["ADAPTERS", "CONFIGS", "TIED", "adapters_of", "config_class", "tied_adapters_of"]

#: ``config.method`` -> kind of host -> the adapter on it; a kind that is missing is not supported
ADAPTERS: dict[str, dict[str, type[Adapter]]] = {
    "LORA": {"linear": Lora, "embedding": LoraEmbedding, "conv": LoraConv},
    "DORA": {"linear": Dora, "embedding": DoraEmbedding, "conv": DoraConv},
    "ADALORA": {"linear": AdaLora, "conv": AdaLoraConv},
    "LOHA": {"linear": LoHa, "conv": LoHaConv},
    "LOKR": {"linear": LoKr, "conv": LoKrConv},
}

#: the same for layers that share the parameters of an adapter on the input embedding (``ensure_weight_tying``)
TIED: dict[str, dict[str, type[Adapter]]] = {
    "LORA": {"linear": TiedLora, "embedding": TiedLoraEmbedding},
}

#: ``peft_type`` -> config
CONFIGS: dict[str, type[PeftConfig]] = {
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "LOHA": LoHaConfig,
    "LOKR": LoKrConfig,
}


def adapters_of(config: PeftConfig) -> dict[str, type[Adapter]]:
    """Kind of host -> adapter, for the method that ``config`` means.

    Raises:
        ConfigError: no such method.
    """
    return ADAPTERS[_known(config.method, ADAPTERS)]


def tied_adapters_of(config: PeftConfig) -> dict[str, type[Adapter]]:
    """Kind of host -> adapter that shares an embedding's parameters; empty where the method has none."""
    return TIED.get(config.method, {})


def config_class(peft_type: str) -> type[PeftConfig]:
    """The config of a method.

    Raises:
        ConfigError: no such method.
    """
    return CONFIGS[_known(peft_type, CONFIGS)]


def _known(method: str, table: Mapping[str, object]) -> str:
    name = str(getattr(method, "value", method))
    if name not in table:
        raise ConfigError(
            f"peft_type {name!r} is not a method of deltaw (it has {', '.join(table)}){did_you_mean(name, table)}"
        )
    return name
