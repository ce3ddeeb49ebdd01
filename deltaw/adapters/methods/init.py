"""How A and B start, as a registry of functions: an initialiser is not a layer.

A *draw* fills A and B with random numbers and zeros. A *decomposition* takes them out of the base weight, which is left
as it is where it is dense: what A and B were at the start is kept beside them (:class:`Start`) and taken off their
product. Over a quantized base, and with LoftQ, the base changes: see ``loftq``.

Draws follow PEFT's order (both linears draw their default first, then A is drawn again), so that one seed gives PEFT
and deltaw the same adapters.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltaw.errors import ConfigError

__all__ = [
    "DECOMPOSITIONS",
    "DRAWS",
    "LOFTQ",
    "Start",
    "decomposition",
    "initialise",
    "initialisers",
    "is_random",
    "known_initialiser",
]

#: fills A (r, in) and B (out, r)
Draw = Callable[[nn.Linear, nn.Linear], None]
#: W (out, in) in float32 or wider, r, s -> A (r, in), B (out, r)
Decomposition = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


# --- draws ------------------------------------------------------------------------------------------------------


def kaiming(lora_A: nn.Linear, lora_B: nn.Linear) -> None:
    """A ~ Kaiming uniform with a = sqrt(5), B = 0 (loralib's choice)."""
    nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))
    _zero(lora_B)


def gaussian(lora_A: nn.Linear, lora_B: nn.Linear) -> None:
    """A ~ N(0, 1/r), B = 0 (the paper's choice, with PEFT's standard deviation 1/r)."""
    nn.init.normal_(lora_A.weight, std=1 / lora_A.out_features)
    _zero(lora_B)


@torch.no_grad()
def orthogonal(lora_A: nn.Linear, lora_B: nn.Linear) -> None:
    """Neither A nor B is zero, yet B A is: A's rows mix the even rows of one random orthogonal matrix (r, r), B's
    columns the odd ones (PEFT's ``orthogonal``).

    Raises:
        ConfigError: r is odd.
    """
    (r, in_features), out_features = lora_A.weight.shape, lora_B.out_features
    if r % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' shares r between A and B, so r={r} must be even")
    if lora_A.weight.is_meta:
        return
    Q = torch.linalg.qr(torch.randn(r, r, device="cpu")).Q
    lora_A.weight.copy_(torch.randn(in_features, r // 2, device="cpu").mm(Q[0::2]).T / 10.0)
    lora_B.weight.copy_(torch.randn(r // 2, out_features, device="cpu").T.mm(Q[1::2]) / 10.0)


def random(lora_A: nn.Linear, lora_B: nn.Linear) -> None:
    """Leaves both at nn.Linear's own draw: the update is not zero. For tests."""


def _zero(lora_B: nn.Linear) -> None:
    nn.init.zeros_(lora_B.weight)
    if lora_B.bias is not None:
        nn.init.zeros_(lora_B.bias)


# --- decompositions -----------------------------------------------------------------------------------------


def pissa(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The r largest singular values of W and their vectors: A = sqrt(S / s) V^T, B = U sqrt(S / s), so that s B A is
    the best approximation of W of rank r (PiSSA, Meng et al. 2024, arXiv 2404.02948, equations 2 and 3)."""
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    return _halves(U[:, :r], S[:r] / scaling, Vt[:r])


def pissa_fast(weight: Tensor, r: int, scaling: float, *, niter: int) -> tuple[Tensor, Tensor]:
    """PiSSA from a randomized SVD with ``niter`` power iterations (Halko et al. 2011, arXiv 0909.4061)."""
    U, S, V = torch.svd_lowrank(weight, r, niter=niter)
    return _halves(U, S / scaling, V.T)


def _halves(U: Tensor, S: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor]:
    root = S.sqrt()
    return root[:, None] * Vt, U * root


def olora(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """W = Q R: A is the first r rows of R, B the first r columns of Q, which are orthonormal (OLoRA, Büyükakyüz 2024,
    arXiv 2406.01775, section 3)."""
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]


class Start(nn.Module):
    """A and B as a decomposition made them: ΔW = s (B A - B0 A0) begins at zero over an unchanged base.

    Buffers, so that they move, are cast and are copied with the model, and no optimizer sees them.

    Args:
        A: (r, in).
        B: (out, r).
        initialiser: the ``init_lora_weights`` that made them.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor, initialiser: str) -> None:
        super().__init__()
        self.register_buffer("A", A.contiguous())
        self.register_buffer("B", B.contiguous())
        self.initialiser = initialiser


# --- the registries -----------------------------------------------------------------------------------------

DRAWS: dict[str, Draw] = {"gaussian": gaussian, "orthogonal": orthogonal}
DECOMPOSITIONS: dict[str, Decomposition] = {"pissa": pissa, "olora": olora}
LOFTQ = "loftq"
_FAST = re.compile(r"pissa_niter_(\d+)")


def initialisers() -> list[str]:
    """The names that ``init_lora_weights`` may be, to be read."""
    return [*DRAWS, *DECOMPOSITIONS, "pissa_niter_4", LOFTQ]


def known_initialiser(choice: bool | str) -> bool:
    """Whether ``init_lora_weights`` may be ``choice``."""
    return isinstance(choice, bool) or choice == LOFTQ or choice in DRAWS or decomposition(choice) is not None


def decomposition(choice: bool | str) -> Decomposition | None:
    """How ``init_lora_weights`` takes A and B out of the base weight; None if it draws them."""
    if not isinstance(choice, str):
        return None
    fast = _FAST.fullmatch(choice)
    return functools.partial(pissa_fast, niter=int(fast[1])) if fast else DECOMPOSITIONS.get(choice)


def is_random(choice: bool | str) -> bool:
    """Whether ``choice`` is a decomposition that comes out differently each time."""
    return isinstance(choice, str) and _FAST.fullmatch(choice) is not None


def initialise(choice: bool | str, lora_A: nn.Linear, lora_B: nn.Linear) -> None:
    """Fills A and B as ``init_lora_weights`` says, when it is a draw."""
    if isinstance(choice, str):
        DRAWS[choice](lora_A, lora_B)
    elif choice:
        kaiming(lora_A, lora_B)
    else:
        random(lora_A, lora_B)
