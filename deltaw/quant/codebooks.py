"""The numbers that codes stand for: NF4, FP4 and the dynamic 8-bit maps, and where one code ends and the next begins.

Every backend reads them here. Knows nothing of blocks or of packing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["FP4", "NF4", "codebook", "derive_nf4", "dynamic_map", "dynamic_thresholds", "order", "thresholds"]

#: by code, which is also by size. These are the published constants, float32: :func:`derive_nf4` comes to within 2e-7
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
#: by code: one bit of sign, two of exponent, one of fraction; over 12. Code 8 is a second zero, never a negative one
FP4 = tuple(sign * size / 12 for sign in (1.0, -1.0) for size in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))


def derive_nf4(offset: float = 0.9677083) -> Tensor:
    """NF4 from its definition (QLoRA, arXiv 2305.14314, section 3): quantiles of N(0, 1), equally likely apart, eight
    on the positive side and seven on the negative, and zero; divided by the largest, so that they fill [-1, 1].

    Args:
        offset: the probability of the outermost quantile, so that it is finite: the mean of 1 - 1/30 and 1 - 1/32.

    Returns:
        float64 [16], ascending.
    """

    def quantiles(count: int) -> Tensor:  # from the outermost towards the median, which is zero and left out
        # the float32 probabilities of the published derivation: in float64 the values move by 1e-6
        return torch.special.ndtri(torch.linspace(offset, 0.5, count + 1, dtype=torch.float32)[:-1].double())

    values = torch.cat([quantiles(8), torch.zeros(1, dtype=torch.float64), -quantiles(7)]).sort().values
    return values / values.max()


@functools.cache
def codebook(quant_type: str, device: torch.device) -> Tensor:
    """float32 [16]: what each code stands for, of ``"nf4"`` or ``"fp4"``."""
    values = torch.tensor({"nf4": NF4, "fp4": FP4}[quant_type], dtype=torch.float32, device=device)
    return values + 0.0  # -0.0 becomes 0.0, as in bitsandbytes' own map


@functools.cache
def order(quant_type: str, device: torch.device) -> Tensor:
    """uint8 [16]: the codes by what they stand for, ascending; of FP4's two zeros code 0 comes first."""
    values = codebook(quant_type, torch.device("cpu"))
    return torch.sort(values, stable=True).indices.to(device=device, dtype=torch.uint8)


@functools.cache
def thresholds(quant_type: str, device: torch.device) -> Tensor:
    """float32 [15], ascending: a value belongs to the k-th code of :func:`order` when k of them are below it; on one,
    it goes to the lower code."""
    values = codebook(quant_type, torch.device("cpu"))[order(quant_type, torch.device("cpu")).long()]
    return _midpoints(values).to(device)


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """float32 [256], ascending: the dynamic tree map (Dettmers 2016, arXiv 1511.04561; 2022, arXiv 2110.02861).

    For each power of ten from 1e-6 to 1, twice as many steps as for the one below: the middles of equal parts of
    [0.1, 1], with both signs, or, unsigned, of twice as many parts. And zero and one.
    """
    values = [0.0, 1.0]
    for i in range(7):
        parts = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        sizes = (10 ** (i - 6) * _midpoints(parts)).tolist()
        values += sizes + ([-size for size in sizes] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.cache
def dynamic_thresholds(signed: bool, device: torch.device) -> Tensor:
    """float32 [255], ascending: a value gets code k when k of them are below it; on one, the lower code."""
    return _midpoints(dynamic_map(signed, torch.device("cpu"))).to(device)


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2
