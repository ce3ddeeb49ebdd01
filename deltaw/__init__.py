"""deltaw: fine-tune large language models with low-rank adapters, under PEFT's names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import deltaw.integrations  # noqa: F401 (loads nothing; it only says what other libraries may ask of our classes)

__version__ = "0.1.0"

# Public name -> the module that defines it, loaded on first use: `deltaw --help` never waits for torch.
_PUBLIC = {
    "AdaLoraConfig": "deltaw.adapters",
    "LoHaConfig": "deltaw.adapters",
    "LoKrConfig": "deltaw.adapters",
    "LoftQConfig": "deltaw.adapters",
    "LoraConfig": "deltaw.adapters",
    "PeftConfig": "deltaw.adapters",
    "PeftType": "deltaw.adapters",
    "TaskType": "deltaw.adapters",
    "inject_adapter_in_model": "deltaw.adapters",
    "replace_lora_weights_loftq": "deltaw.adapters",
    "full_weights": "deltaw.fullweights",
    "PeftModel": "deltaw.model",
    "get_peft_model": "deltaw.model",
    "AutoPeftModel": "deltaw.auto",
    "AutoPeftModelForCausalLM": "deltaw.auto",
    "AutoPeftModelForFeatureExtraction": "deltaw.auto",
    "AutoPeftModelForQuestionAnswering": "deltaw.auto",
    "AutoPeftModelForSeq2SeqLM": "deltaw.auto",
    "AutoPeftModelForSequenceClassification": "deltaw.auto",
    "AutoPeftModelForTokenClassification": "deltaw.auto",
    "PeftModelForCausalLM": "deltaw.tasks",
    "PeftModelForFeatureExtraction": "deltaw.tasks",
    "PeftModelForQuestionAnswering": "deltaw.tasks",
    "PeftModelForSeq2SeqLM": "deltaw.tasks",
    "PeftModelForSequenceClassification": "deltaw.tasks",
    "PeftModelForTokenClassification": "deltaw.tasks",
    "get_peft_model_state_dict": "deltaw.statedict",
    "set_peft_model_state_dict": "deltaw.statedict",
    "get_layer_status": "deltaw.status",
    "get_model_status": "deltaw.status",
    "MergeReport": "deltaw.merge",
    "merge_report": "deltaw.merge",
    "QuantizedMergeReport": "deltaw.merge_quantized",
    "quantized_merge_report": "deltaw.merge_quantized",
    "load_model": "deltaw.loading",
    "load_tokenizer": "deltaw.loading",
    "SFTConfig": "deltaw.train",
    "SFTTrainer": "deltaw.train",
    "SteeringCallback": "deltaw.train",
    "causal_lm_loss": "deltaw.train",
    "AdamW8bit": "deltaw.optim",
    "PagedAdamW": "deltaw.optim",
    "PagedAdamW8bit": "deltaw.optim",
    "PagedAdamW32bit": "deltaw.optim",
    "NF4Config": "deltaw.quant",
    "NF4Linear": "deltaw.quant",
    "quantize_": "deltaw.quant",
    "prepare_model_for_kbit_training": "deltaw.kbit",
    "PRESETS": "deltaw.presets",
}

__all__ = [
    "PRESETS",
    "AdaLoraConfig",
    "AdamW8bit",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoHaConfig",
    "LoKrConfig",
    "LoftQConfig",
    "LoraConfig",
    "MergeReport",
    "NF4Config",
    "NF4Linear",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "QuantizedMergeReport",
    "SFTConfig",
    "SFTTrainer",
    "SteeringCallback",
    "TaskType",
    "__version__",
    "causal_lm_loss",
    "full_weights",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_model",
    "load_tokenizer",
    "merge_report",
    "prepare_model_for_kbit_training",
    "quantize_",
    "quantized_merge_report",
    "replace_lora_weights_loftq",
    "set_peft_model_state_dict",
]

if TYPE_CHECKING:
    from deltaw.adapters import (
        AdaLoraConfig,
        LoftQConfig,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        PeftConfig,
        PeftType,
        TaskType,
        inject_adapter_in_model,
        replace_lora_weights_loftq,
    )
    from deltaw.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from deltaw.fullweights import full_weights
    from deltaw.kbit import prepare_model_for_kbit_training
    from deltaw.loading import load_model, load_tokenizer
    from deltaw.merge import MergeReport, merge_report
    from deltaw.merge_quantized import QuantizedMergeReport, quantized_merge_report
    from deltaw.model import PeftModel, get_peft_model
    from deltaw.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
    from deltaw.presets import PRESETS
    from deltaw.quant import NF4Config, NF4Linear, quantize_
    from deltaw.statedict import get_peft_model_state_dict, set_peft_model_state_dict
    from deltaw.status import get_layer_status, get_model_status
    from deltaw.tasks import (
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from deltaw.train import SFTConfig, SFTTrainer, SteeringCallback, causal_lm_loss


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'deltaw' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
