"""Instruction tuning on rows of the Alpaca format (the article's section 7.3).

python examples/article/sft_alpaca.py [MODEL] [--data FILE] [--output FOLDER]

The article trains on ``tatsu-lab/alpaca``, which --data accepts as well (52,000 rows: not for a CPU). The default is
a sample of forty rows of our own in the same format. As in the original, each row also carries a ``text`` column, the
prompt and the answer in one string. It is not what is trained on: the loss would then cover the prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from deltaw import LoraConfig, SFTConfig, SFTTrainer
from deltaw.data import load_rows

SAMPLE = Path(__file__).with_name("alpaca_sample.jsonl")


def main(argv: Sequence[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--data", default=str(SAMPLE), help="a file, a folder or a hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/article"))
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early; default: the whole epoch")
    args = parser.parse_args(argv)

    dataset = load_rows(args.data, split="train")  # the Dataset that load_dataset gives is fine too

    peft_config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    trainer = SFTTrainer(
        model=args.model,  # loaded in the dtype of its checkpoint, never silently in float32
        args=SFTConfig(
            output_dir=str(args.output / "lora-output"),
            num_train_epochs=1,
            max_steps=args.max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            learning_rate=2e-4,
            bf16=True,
            logging_steps=10,
            save_strategy="epoch",
            max_seq_length=2048,  # the older name of max_length, taken with a note
        ),
        train_dataset=dataset,
        peft_config=peft_config,
    )
    trainer.train()

    trainer.save_model(str(args.output / "lora-adapter"))  # the adapter and the tokenizer, not the base
    return trainer


if __name__ == "__main__":
    main()
