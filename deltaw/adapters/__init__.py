"""The methods, the layers that host them, and their injection into a model."""

from deltaw.adapters.adapted import AdaptedBase
from deltaw.adapters.base import Adapter
from deltaw.adapters.combine import COMBINATIONS
from deltaw.adapters.config import PeftConfig, PeftType, TaskType
from deltaw.adapters.host import HostLayer, adapters_named, host_layers
from deltaw.adapters.hosts.conv import Conv
from deltaw.adapters.hosts.embedding import Embedding
from deltaw.adapters.hosts.linear import Linear
from deltaw.adapters.inject import inject, inject_adapter_in_model, remove_adapter, set_active, trained_biases
from deltaw.adapters.methods.adalora import AdaLora
from deltaw.adapters.methods.adalora_config import AdaLoraConfig
from deltaw.adapters.methods.dora import Dora
from deltaw.adapters.methods.dora_conv import DoraConv
from deltaw.adapters.methods.dora_embedding import DoraEmbedding
from deltaw.adapters.methods.loftq import LoftQConfig
from deltaw.adapters.methods.loha import LoHa, LoHaConfig, LoHaConv
from deltaw.adapters.methods.lokr import LoKr, LoKrConfig, LoKrConv
from deltaw.adapters.methods.lora import Lora, LoraConfig
from deltaw.adapters.methods.lora_conv import LoraConv
from deltaw.adapters.methods.lora_embedding import LoraEmbedding
from deltaw.adapters.registry import ADAPTERS, CONFIGS, adapters_of, config_class
from deltaw.adapters.replace import replace_lora_weights_loftq
from deltaw.adapters.routing import BASE, carried
from deltaw.adapters.saved import ModulesToSaveWrapper
from deltaw.adapters.tokens import TokenHost

__all__ = [
    "ADAPTERS",
    "BASE",
    "COMBINATIONS",
    "CONFIGS",
    "AdaLora",
    "AdaLoraConfig",
    "AdaptedBase",
    "Adapter",
    "Conv",
    "Dora",
    "DoraConv",
    "DoraEmbedding",
    "Embedding",
    "HostLayer",
    "Linear",
    "LoHa",
    "LoHaConfig",
    "LoHaConv",
    "LoKr",
    "LoKrConfig",
    "LoKrConv",
    "LoftQConfig",
    "Lora",
    "LoraConfig",
    "LoraConv",
    "LoraEmbedding",
    "ModulesToSaveWrapper",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "TokenHost",
    "adapters_named",
    "adapters_of",
    "carried",
    "config_class",
    "host_layers",
    "inject",
    "inject_adapter_in_model",
    "remove_adapter",
    "replace_lora_weights_loftq",
    "set_active",
    "trained_biases",
]
