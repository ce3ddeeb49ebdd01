"""Ways to make batches of one data set, side by side: real tokens a second, and the places that hold none.

    python benchmarks/batches.py [--rows 256] [--batch 16] [--rounds 5] [--tiny]

Padded in random order, grouped by length, padding-free (the batch's examples in one row) and packed (rows of
``--length``, as many a step as make up about the batch's tokens). All train one model with the same weights and take
turns, a step each; a step is forward and backward through ``causal_lm_loss``. Random order has the lengths of
the data, so each way is given the same examples over a round. ``--tiny`` takes a random model of two layers instead.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from common import machine, table

from deltaw import LoraConfig, causal_lm_loss, get_peft_model, load_model
from deltaw.data import Collator, FlatCollator, PackedDataset, TokenDataset, batch_waste, render_all
from deltaw.data.order import epoch_order
from deltaw.loading import load_tokenizer
from text_to_sql.build import build

#: rows of different kinds would hide what lengths do: the questions are repeated to these shares of their own length
SPREAD = (1, 1, 1, 2, 3)


def data(args: argparse.Namespace) -> TokenDataset:
    """Text-to-SQL rows; with ``--spread`` some of them longer, as chats are."""
    rows = build(0, args.rows, 0)["train"]
    factors = SPREAD if args.spread else (1,)
    told = [{"prompt": row["prompt"] * factors[i % len(factors)], "completion": row["completion"]}
            for i, row in enumerate(rows)]  # fmt: skip
    return TokenDataset.of(render_all(told, load_tokenizer("smollm2-135m")))


def model_of(args: argparse.Namespace) -> Any:
    if args.tiny:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
        base: Any = LlamaForCausalLM(
            LlamaConfig(vocab_size=49152, num_attention_heads=4, num_key_value_heads=2, **shape)
        ).bfloat16()
    else:
        base = load_model("smollm2-135m", dtype=torch.bfloat16)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def steps_of(tokens: TokenDataset, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The batches of an epoch, for each way."""

    def batches(examples: Any, order: Any, size: int, collate: Any) -> list[dict[str, Any]]:
        return [collate([examples[int(i)] for i in order[at : at + size]]) for at in range(0, len(order), size)]

    random = epoch_order(len(tokens), "random", 0, 0)
    grouped = epoch_order(len(tokens), "group_by_length", 0, 0, lengths=tokens.lengths, batch_size=args.batch)
    packed = PackedDataset(tokens, args.length)
    rows = max(1, round(args.batch * float(tokens.lengths.mean()) / args.length))
    return {
        "padded, random": batches(tokens, random, args.batch, Collator(0)),
        "padded, by length": batches(tokens, grouped, args.batch, Collator(0)),
        "padding-free": batches(tokens, random, args.batch, FlatCollator()),
        f"packed, {rows} x {args.length}": batches(packed, range(len(packed)), rows, FlatCollator()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each way, in turns")
    parser.add_argument("--spread", action="store_true", help="make some examples two and three times as long")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    tokens, model = data(args), model_of(args)
    ways = steps_of(tokens, args)
    losses: dict[str, float] = {}

    def epoch(name: str) -> float:
        started, total = time.perf_counter(), 0.0
        for batch in ways[name]:
            model.zero_grad()
            loss = causal_lm_loss(model, **batch, num_items_in_batch=1)  # a sum: alike however it is batched
            loss.backward()
            total += float(loss.detach())
        losses[name] = total
        return time.perf_counter() - started

    for batches in ways.values():
        causal_lm_loss(model, **batches[0]).backward()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name in ways:
            seconds[name].append(epoch(name))
    shares = list(batch_waste(tokens.lengths, args.batch, args.length).values())
    first = tokens.tokens / statistics.median(seconds["padded, random"])
    rows = []
    for name, share in zip(ways, shares, strict=True):
        rate = tokens.tokens / statistics.median(seconds[name])
        best = tokens.tokens / min(seconds[name])
        rows.append([name, f"{rate:.0f}", f"{best:.0f}", f"{rate / first:.2f}", f"{share:.0%}", f"{losses[name]:.1f}"])
    lengths = tokens.lengths
    print(
        f"\n{len(tokens)} examples of {lengths.min()} to {lengths.max()} tokens (mean {lengths.mean():.0f}), "
        f"{args.batch} a batch; {args.rounds} epochs each\n{machine()}\n"
    )
    print(table(["batches", "tokens/s", "at best", "over random", "empty places", "loss, summed"], rows))


if __name__ == "__main__":
    main()
