"""Three configurations to start from (the article's section 9.7), and what each trains on a model.

python examples/article/templates.py [MODEL]

The same three are deltaw's presets, so ``deltaw train run.yaml --preset high_performance`` says the same as the code
below. The count needs no weights: the model is built on the meta device from its config alone.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw import PRESETS, LoraConfig, get_peft_model
from deltaw.loading import resolve_model

# instruction tuning
config_standard = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules="all-linear",
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)

# least memory, meant for a base in 4 bits
config_memory_efficient = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.1,
    bias="none",
    task_type="CAUSAL_LM",
)

# best results: a high rank, kept stable by the scale alpha / sqrt(r)
config_high_performance = LoraConfig(
    r=64,
    lora_alpha=128,
    target_modules="all-linear",
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
    use_rslora=True,
)

TEMPLATES = {
    "standard": config_standard,
    "memory_efficient": config_memory_efficient,
    "high_performance": config_high_performance,
}


def trainable(model_id: str, config: LoraConfig) -> tuple[int, int]:
    """(trainable, all) parameters of the adapted model; nothing is loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_id))
        return get_peft_model(model, dataclasses.replace(config)).get_nb_trainable_parameters()


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    args = parser.parse_args(argv)

    counts: dict[str, int] = {}
    for name, template in TEMPLATES.items():
        preset = LoraConfig(**PRESETS[name], task_type="CAUSAL_LM")  # type: ignore[arg-type]
        same = "the preset" if preset == template else "NOT the preset"
        counts[name], everything = trainable(resolve_model(args.model), template)
        print(f"{name:17} {same}; trains {counts[name]:>12,} of {everything:,} parameters")
    return counts


if __name__ == "__main__":
    main()
