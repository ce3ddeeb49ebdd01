"""How A and B start, as a registry of functions: an initialiser is not a layer.

Draws follow PEFT's order (both linears draw their default first, then A is drawn again), so that one seed
gives PEFT and deltaw the same adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

__all__ = ["INITIALISERS", "initialiser"]

Initialiser = Callable[[nn.Linear, nn.Linear], None]


def kaiming(lora_A: nn.Linear, lora_B: nn.Linear) -> None:
    """A ~ Kaiming uniform with a = sqrt(5), B = 0 (loralib's choice)."""
    nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
    _zero(lora_B)


def gaussian(lora_A: nn.Linear, lora_B: nn.Linear) -> None:
    """A ~ N(0, 1/r), B = 0 (the paper's choice, with PEFT's standard deviation 1/r)."""
    nn.init.normal_(lora_A.weight, std=1 / lora_A.out_features)
    _zero(lora_B)


def random(lora_A: nn.Linear, lora_B: nn.Linear) -> None:
    """Leaves both at nn.Linear's own draw: the update is not zero. For tests."""


def _zero(lora_B: nn.Linear) -> None:
    nn.init.zeros_(lora_B.weight)
    if lora_B.bias is not None:
        nn.init.zeros_(lora_B.bias)


INITIALISERS: dict[str, Initialiser] = {"gaussian": gaussian}


def initialiser(choice: bool | str) -> Initialiser:
    """The function that ``init_lora_weights`` means."""
    if isinstance(choice, str):
        return INITIALISERS[choice]
    return kaiming if choice else random
