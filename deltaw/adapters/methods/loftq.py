"""A and B that start from what quantization lost: LoftQ, and PiSSA or OLoRA over a weight in few bits.

LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1) looks for Q + s B A near W by turns: Q = quantize(W - s B A), then
s B A = the best approximation of W - Q of rank r. PEFT leaves s out, which is right for s = 1 alone, and does not look
whether a turn helped. A decomposition of
W (PiSSA, OLoRA) leaves Q = quantize(W - s B A) in the base. Knows nothing of layers or of where W comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltaw.adapters.methods.init import Decomposition, pissa

__all__ = ["LoftQConfig", "as_in_4bit", "loftq", "loftq_faults", "of_what_is_lost", "taken_out"]

#: writes a weight into the base, and gives what the base holds then, (out, in) in float32 or wider
Write = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class LoftQConfig:
    """How ``init_lora_weights="loftq"`` works, with PEFT's fields.

    Args:
        loftq_bits: 4; nothing else is quantized here.
        loftq_iter: how often quantization and decomposition take turns.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


def loftq_faults(values: dict[str, Any]) -> list[str]:
    """What is wrong with a ``loftq_config``, one line each."""
    names = [field.name for field in dataclasses.fields(LoftQConfig)]
    faults = [f"loftq_config: {key!r} is no setting of LoftQ; there are {names}" for key in values if key not in names]
    bits, turns = values.get("loftq_bits", 4), values.get("loftq_iter", 1)
    if bits != 4:
        faults.append(f"loftq_bits={bits!r}: only 4 bits are supported")
    if not isinstance(turns, int) or isinstance(turns, bool) or turns < 1:
        faults.append(f"loftq_iter={turns!r}: a positive integer is needed (1 to 5 are common)")
    return faults


def of_what_is_lost(weight: Tensor, base: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s B A the best approximation of ``weight - base`` of rank r."""
    return pissa(weight - base, r, scaling)


def loftq(weight: Tensor, write: Write, r: int, scaling: float, turns: int) -> tuple[Tensor, Tensor]:
    """LoftQ's A (r, in) and B (out, r); their Q is what was written last.

    Args:
        weight: W (out, in) in float32 or wider.
        turns: T of the paper, at most: a turn that does not bring Q + s B A nearer to W is taken back and the last.
    """
    Q, target = write(weight), weight
    A, B = of_what_is_lost(weight, Q, r, scaling)
    for _ in range(turns - 1):
        rest = without(weight, A, B, scaling)
        new_Q = write(rest)
        new_A, new_B = of_what_is_lost(weight, new_Q, r, scaling)
        if torch.dist(without(weight, new_A, new_B, scaling), new_Q) >= torch.dist(rest, Q):
            write(target)
            break
        Q, target, A, B = new_Q, rest, new_A, new_B
    return A, B


def taken_out(weight: Tensor, write: Write, r: int, scaling: float, decompose: Decomposition) -> tuple[Tensor, Tensor]:
    """A and B as ``decompose`` takes them out of W; what is left is written.

    A decomposition that draws random numbers draws the same ones each time: whoever loads the adapter makes it again.
    """
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)
        A, B = decompose(weight, r, scaling)
    write(without(weight, A, B, scaling))
    return A, B


def without(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return torch.addmm(weight, B, A, alpha=-scaling)  # (out, r) @ (r, in)


def as_in_4bit(weight: Tensor) -> Tensor:
    """The values that NF4 has for ``weight``, which stay in a dense base (as in PEFT's LoftQ)."""
    from deltaw.quant import dequantize_4bit, quantize_4bit  # loads transformers, which nothing else here needs

    return dequantize_4bit(quantize_4bit(weight, dtype=torch.float32)).to(weight.dtype)
