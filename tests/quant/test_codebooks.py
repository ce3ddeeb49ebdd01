"""The maps against bitsandbytes' own and against their definitions."""

import math

import bnb
import pytest
import torch

from deltaw.quant.codebooks import (
    FP4,
    NF4,
    codebook,
    derive_nf4,
    dynamic_map,
    dynamic_thresholds,
    order,
    thresholds,
)

CPU = torch.device("cpu")


def test_nf4_follows_from_the_normal_quantiles():
    """QLoRA, section 3: quantiles of N(0, 1), eight on the positive side, seven on the negative, and an exact zero."""
    derived = derive_nf4()
    published = torch.tensor(NF4, dtype=torch.float64)
    assert derived.dtype == torch.float64
    assert len(derived) == 16
    assert (derived - published).abs().max() < 2e-7
    assert derived[7] == 0
    assert (derived[0], derived[15]) == (-1, 1)


def test_another_offset_gives_another_map():
    assert (derive_nf4(0.98) - derive_nf4()).abs().max() > 1e-2


def test_the_offset_is_the_one_of_the_definition():
    """The mean of the outermost probabilities for 15 and for 16 quantiles."""
    assert math.isclose((1 - 1 / 30 + 1 - 1 / 32) / 2, 0.9677083, abs_tol=1e-7)


def test_the_published_values_are_float32_numbers():
    assert torch.tensor(NF4, dtype=torch.float32).double().tolist() == list(NF4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codebooks_are_bitsandbytes(quant_type):
    ours = codebook(quant_type, CPU)
    assert torch.equal(ours, bnb.functional.get_4bit_type(quant_type, device="cpu"))
    assert not ours[ours == 0].signbit().any(), "a negative zero would be other bits than bitsandbytes'"


def test_fp4_is_a_float_of_four_bits():
    """Sign, two bits of exponent (bias 2), one of fraction, subnormal below; over 12 (the lead bits: 1.5 * 2^3)."""
    assert FP4[0b0011] == 1
    for code in range(16):
        exponent, fraction = (code >> 1) & 3, code & 1
        # the order of the exponents is the format's own: 0 is subnormal, then 8, 4, 2
        size = fraction * 2**-4 if exponent == 0 else (1 + fraction / 2) * 2 ** (4 - exponent)
        assert FP4[code] == pytest.approx((-size if code & 8 else size) / 12)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_are_bitsandbytes(signed):
    ours = dynamic_map(signed, CPU)
    assert torch.equal(ours, bnb.functional.create_dynamic_map(signed))
    assert torch.equal(ours, ours.unique())  # 256 different values, ascending


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_thresholds_lie_half_way(quant_type):
    values = codebook(quant_type, CPU)[order(quant_type, CPU).long()]
    assert torch.equal(values, values.sort().values)
    bounds = thresholds(quant_type, CPU)
    assert bounds.dtype == torch.float32
    assert torch.equal(bounds, (values[:-1] + values[1:]) / 2)
    assert sorted(order(quant_type, CPU).tolist()) == list(range(16))


def test_of_two_zeros_the_first_is_taken():
    assert order("fp4", CPU).tolist()[7:9] == [0, 8]


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_thresholds_lie_half_way(signed):
    values = dynamic_map(signed, CPU)
    assert torch.equal(dynamic_thresholds(signed, CPU), (values[:-1] + values[1:]) / 2)
    # a value of the map is its own nearest
    assert torch.equal(torch.bucketize(values, dynamic_thresholds(signed, CPU)), torch.arange(256))


def test_tables_are_made_once_a_device():
    assert codebook("nf4", CPU) is codebook("nf4", CPU)
    assert codebook("nf4", torch.device("meta")).is_meta
