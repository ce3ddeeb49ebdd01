"""deltaw: fine-tune large language models with low-rank adapters, under PEFT's names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it, loaded on first use: `deltaw --help` never waits for torch.
_PUBLIC = {
    "LoraConfig": "deltaw.adapters",
    "PeftConfig": "deltaw.adapters",
    "PeftType": "deltaw.adapters",
    "TaskType": "deltaw.adapters",
    "inject_adapter_in_model": "deltaw.adapters",
    "PeftModel": "deltaw.model",
    "get_peft_model": "deltaw.model",
    "MergeReport": "deltaw.merge",
    "merge_report": "deltaw.merge",
    "load_model": "deltaw.loading",
    "load_tokenizer": "deltaw.loading",
    "SFTConfig": "deltaw.train",
    "SFTTrainer": "deltaw.train",
    "causal_lm_loss": "deltaw.train",
    "PRESETS": "deltaw.presets",
}

__all__ = [
    "PRESETS",
    "LoraConfig",
    "MergeReport",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "SFTConfig",
    "SFTTrainer",
    "TaskType",
    "__version__",
    "causal_lm_loss",
    "get_peft_model",
    "inject_adapter_in_model",
    "load_model",
    "load_tokenizer",
    "merge_report",
]

if TYPE_CHECKING:
    from deltaw.adapters import LoraConfig, PeftConfig, PeftType, TaskType, inject_adapter_in_model
    from deltaw.loading import load_model, load_tokenizer
    from deltaw.merge import MergeReport, merge_report
    from deltaw.model import PeftModel, get_peft_model
    from deltaw.presets import PRESETS
    from deltaw.train import SFTConfig, SFTTrainer, causal_lm_loss


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'deltaw' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
