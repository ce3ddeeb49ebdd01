"""What four bits cost: bits a weight and error of each way to keep it, on normal weights and on SmolLM2's own.

    python benchmarks/quant_error.py

The error is |w - read back| over |w|, as a mean and as a root mean square, each over all weights. INT4 is here in its
usual two forms, with as many weights a scale as the others: symmetric (15 levels, absmax) and asymmetric (16 levels
between the smallest and the largest, which takes a second float32).

The built-in SmolLM2 comes from a file that kept its weights in asymmetric INT4 of its own (GGUF's Q4_1: 32 weights a
scale), so each block of 64 holds about 26 different values, and asymmetric INT4 fits them better than it would the
weights as they were trained.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from common import machine, table
from torch import Tensor

from deltaw import load_model
from deltaw.quant import dequantize_4bit, quantize_4bit
from deltaw.quant.quantize import quantizable

MODEL = "smollm2-135m"
BLOCK = 64
#: float32 weights -> (what is read back, bytes that are kept)
Way = Callable[[Tensor], tuple[Tensor, int]]


def four_bits(weight: Tensor, quant_type: str, *, nested: bool = False) -> tuple[Tensor, int]:
    packed = quantize_4bit(weight, quant_type, BLOCK, nested=nested)
    return dequantize_4bit(packed), packed.nbytes()


def int4(weight: Tensor, *, symmetric: bool) -> tuple[Tensor, int]:
    n = weight.numel()
    # the last block is filled up with its own last value, which changes neither its extremes nor what is counted
    blocks = F.pad(weight.view(1, -1), (0, -n % BLOCK), mode="replicate").view(-1, BLOCK)
    if symmetric:
        step = blocks.abs().amax(1, keepdim=True) / 7
        read = (blocks / step.clamp(min=1e-38)).round() * step
    else:
        lowest, highest = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        step = (highest - lowest) / 15
        read = ((blocks - lowest) / step.clamp(min=1e-38)).round() * step + lowest
    return read.view(-1)[:n].view_as(weight), (n + 1) // 2 + (1 if symmetric else 2) * 4 * len(blocks)


WAYS: dict[str, Way] = {
    "NF4": partial(four_bits, quant_type="nf4"),
    "NF4, double quantization": partial(four_bits, quant_type="nf4", nested=True),
    "FP4": partial(four_bits, quant_type="fp4"),
    "FP4, double quantization": partial(four_bits, quant_type="fp4", nested=True),
    "INT4, symmetric": partial(int4, symmetric=True),
    "INT4, asymmetric": partial(int4, symmetric=False),
}


def measured(way: Way, weights: Iterable[Tensor]) -> tuple[float, float, float]:
    """(bits a weight, mean error, root mean square error); errors over the size of the weights."""
    count = held = 0
    absolute = size = square = energy = 0.0
    for weight in weights:
        read, kept = way(weight)
        error = (weight - read).double()
        wide = weight.double()
        count, held = count + weight.numel(), held + kept
        absolute, size = absolute + error.abs().sum().item(), size + wide.abs().sum().item()
        square, energy = square + error.square().sum().item(), energy + wide.square().sum().item()
    return 8 * held / count, absolute / size, math.sqrt(square / energy)


def normal_weights(count: int) -> list[Tensor]:
    return [torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def model_weights() -> list[Tensor]:
    """The weights of SmolLM2's 210 linear layers, as they are in bfloat16."""
    model = load_model(MODEL)
    head = model.get_output_embeddings()
    return [m.weight.detach().float() for m in model.modules() if quantizable(m) and m is not head]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normal", type=int, default=16, help="matrices of 1024 x 1024 normal weights")
    arguments = parser.parse_args()
    sets = {"N(0, 1)": normal_weights(arguments.normal), MODEL: model_weights()}
    print(machine())
    for name, weights in sets.items():
        total = sum(weight.numel() for weight in weights)
        print(f"\n{name}: {total:,} weights in {len(weights)} matrices, {BLOCK} a block\n")
        rows = []
        for way, function in WAYS.items():
            bits, mean, root = measured(function, weights)
            rows.append([way, f"{bits:.3f}", f"{mean:.2%}", f"{root:.2%}"])
        print(table(["", "bits a weight", "mean error", "RMS error"], rows))


if __name__ == "__main__":
    main()
