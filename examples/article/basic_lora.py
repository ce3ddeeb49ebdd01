"""LoRA on a causal language model (the article's section 7.2).

python examples/article/basic_lora.py [MODEL]

MODEL is a folder, a hub id or a built-in name; the article's is meta-llama/Llama-2-7b-hf.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

from deltaw import LoraConfig, PeftModel, TaskType, get_peft_model
from deltaw.loading import resolve_model


def main(argv: Sequence[str] | None = None) -> PeftModel:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    args = parser.parse_args(argv)

    model_id = resolve_model(args.model)  # a built-in name becomes a folder, all else stays what it is
    model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype=torch.bfloat16, device_map="auto")

    lora_config = LoraConfig(
        r=16,
        lora_alpha=32,  # the update is scaled by alpha / r = 2
        target_modules="all-linear",  # every linear layer but the output head
        lora_dropout=0.05,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    model = get_peft_model(model, lora_config)

    # For Llama-2-7b the article prints 20,277,248 of 6,758,404,096. That is not r=16 on all linear layers, which
    # trains 39,976,960 (0.59% of 6,778,392,576): 20,277,248 is r=8 with the output head adapted too, and
    # 6,758,404,096 is the base with r=8 without the head (19,988,480). tests/examples/test_article.py counts all three.
    model.print_trainable_parameters()
    return model


if __name__ == "__main__":
    main()
