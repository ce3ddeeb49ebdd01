"""QLoRA: LoRA over a base in 4 bits (the article's section 7.4).

python examples/article/qlora.py [MODEL]

NF4Config takes the fields of transformers' BitsAndBytesConfig, so that nothing below the imports changes; bitsandbytes
itself is not needed. The model is quantized layer by layer while it loads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

from deltaw import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from deltaw import NF4Config as BitsAndBytesConfig
from deltaw.loading import resolve_model


def main(argv: Sequence[str] | None = None) -> PeftModel:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    args = parser.parse_args(argv)

    bnb_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # codes at the quantiles of a normal distribution
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,  # 4.127 bits a weight instead of 4.5
    )
    model = AutoModelForCausalLM.from_pretrained(
        resolve_model(args.model), quantization_config=bnb_config, device_map="auto"
    )

    model = prepare_model_for_kbit_training(model)  # activation checkpointing; norms stay in their dtype

    lora_config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora_config)
    model.print_trainable_parameters()
    return model


if __name__ == "__main__":
    main()
