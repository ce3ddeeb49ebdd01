"""The methods, the layers that host them, and their injection into a model."""

from deltaw.adapters.adapted import AdaptedBase
from deltaw.adapters.base import Adapter
from deltaw.adapters.config import PeftConfig, PeftType, TaskType
from deltaw.adapters.host import HostLayer, host_layers
from deltaw.adapters.inject import inject, inject_adapter_in_model, remove_adapter, set_active, trained_biases
from deltaw.adapters.linear import Linear
from deltaw.adapters.lora import Lora, LoraConfig
from deltaw.adapters.registry import ADAPTERS, CONFIGS, adapter_class, config_class
from deltaw.adapters.saved import ModulesToSaveWrapper

__all__ = [
    "ADAPTERS",
    "CONFIGS",
    "AdaptedBase",
    "Adapter",
    "HostLayer",
    "Linear",
    "Lora",
    "LoraConfig",
    "ModulesToSaveWrapper",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "adapter_class",
    "config_class",
    "host_layers",
    "inject",
    "inject_adapter_in_model",
    "remove_adapter",
    "set_active",
    "trained_biases",
]
