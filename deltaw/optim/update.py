"""One step of AdamW on flat float32 arrays, with states in 32 or in 8 bits.

Knows nothing of parameters, models or where the states are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from deltaw.quant.backends import backend_for
from deltaw.quant.ops import dequantize_8bit, quantize_8bit

__all__ = ["BLOCKSIZE", "Rates", "adamw_", "adamw_8bit_"]

#: elements of an 8-bit state that share one absmax
BLOCKSIZE = 256
_FUSED = ("cpu", "cuda")  # where torch has one kernel for the whole step


@dataclass(frozen=True)
class Rates:
    """What a step needs to know: the settings of AdamW and which step it is, counted from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


@torch.no_grad()
def adamw_(
    values: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], rates: Rates
) -> None:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2), in place: torch's own kernel, so that
    ``adamw_torch_fused`` gives the same bits.

    Args:
        values: parameters, float32.
        grads, exp_avgs, exp_avg_sqs: their gradients and moments m and v, float32, each as large as its parameter.
    """
    fused = values[0].device.type in _FUSED
    before = torch.full((len(values),), rates.step - 1.0, device=values[0].device if fused else "cpu")
    adamw(
        values, grads, exp_avgs, exp_avg_sqs, [], list(before.unbind()), fused=fused, foreach=False, amsgrad=False,
        lr=rates.lr, beta1=rates.beta1, beta2=rates.beta2, weight_decay=rates.weight_decay, eps=rates.eps,
        maximize=False,
    )  # fmt: skip


@torch.no_grad()
def adamw_8bit_(
    values: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    rates: Rates,
) -> None:
    """The same with moments in blocks of 8 bits (Dettmers et al. 2022, arXiv 2110.02861, section 2): read, stepped in
    float32, packed again. m has the signed dynamic map; v, never negative, the unsigned one.

    Args:
        values, grads: float32 [n].
        exp_avg, exp_avg_sq: codes, uint8 [n].
        exp_avg_absmax, exp_avg_sq_absmax: float32 [ceil(n / 256)].
    """
    one_pass = getattr(backend_for(values.device), "adamw_8bit", None)  # a backend may have all of it in one kernel
    if one_pass is not None:
        one_pass(
            values, grads, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax,
            lr=rates.lr, beta1=rates.beta1, beta2=rates.beta2, eps=rates.eps, weight_decay=rates.weight_decay,
            step=rates.step,
        )  # fmt: skip
        return
    m = dequantize_8bit(exp_avg, exp_avg_absmax, signed=True, blocksize=BLOCKSIZE)
    v = dequantize_8bit(exp_avg_sq, exp_avg_sq_absmax, signed=False, blocksize=BLOCKSIZE)
    # One rounding an operation, so that the bits depend neither on the device nor on where in an array an element is.
    m.add_(grads.sub(m).mul_(1 - rates.beta1))
    v.mul_(rates.beta2).add_(grads.mul(1 - rates.beta2).mul_(grads))
    scale = v.sqrt().div_(math.sqrt(1 - rates.beta2**rates.step)).add_(rates.eps)
    values.mul_(1 - rates.lr * rates.weight_decay)
    values.add_(m.mul(-rates.lr / (1 - rates.beta1**rates.step)).div_(scale))
    _pack(m, True, exp_avg, exp_avg_absmax)
    _pack(v, False, exp_avg_sq, exp_avg_sq_absmax)


def _pack(moment: Tensor, signed: bool, codes: Tensor, absmax: Tensor) -> None:
    new_codes, new_absmax = quantize_8bit(moment, signed=signed, blocksize=BLOCKSIZE)
    codes.copy_(new_codes)
    absmax.copy_(new_absmax)
