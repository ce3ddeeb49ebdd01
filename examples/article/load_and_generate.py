"""A trained adapter, loaded, merged into its base and asked (the article's section 7.5).

python examples/article/load_and_generate.py [MODEL] [--adapter FOLDER] [--prompt TEXT]

Run sft_alpaca.py first: it writes the adapter that --adapter names by default.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw import PeftConfig, PeftModel
from deltaw.loading import resolve_model


def main(argv: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="the base of the adapter")
    parser.add_argument("--adapter", default="runs/article/lora-adapter")
    parser.add_argument("--prompt", default="The future of AI is")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    args = parser.parse_args(argv)

    # first, because a wrong folder must not cost the time that a model takes to load
    config = PeftConfig.from_pretrained(args.adapter)
    print(f"{config.peft_type} adapter, trained on {config.base_model_name_or_path}")

    model_id = resolve_model(args.model)
    base_model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype=torch.bfloat16, device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_id)

    model: Any = PeftModel.from_pretrained(base_model, args.adapter)
    model = model.merge_and_unload()  # optional; from here on it is a plain transformers model

    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=args.max_new_tokens)
    text = tokenizer.decode(outputs[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main()
