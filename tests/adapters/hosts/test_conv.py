"""The host of convolutions: another weight of the same shape, convolved as the base convolves its own."""

import pytest
import torch
from convolutions import convolutions
from hypothesis import given, settings
from torch import nn

import deltaw
from deltaw.adapters import Conv
from deltaw.errors import TargetError


@settings(max_examples=60, deadline=None)
@given(case=convolutions())
def test_another_weight_is_convolved_as_the_base_s_own(case):
    base, x = case
    host, other = Conv(base), torch.randn_like(base.weight)
    expected = torch.func.functional_call(base, {"weight": other}, (x,))
    if base.bias is not None:
        expected = expected - base.bias.view(-1, *[1] * host.dimensions)
    assert torch.allclose(host.convolve(x, other), expected, atol=1e-5)


def test_it_looks_like_the_layer_it_wraps():
    host = Conv(nn.Conv2d(4, 6, 3, groups=2))
    assert (host.in_channels, host.out_channels, host.groups, host.dimensions) == (4, 6, 2, 2)
    assert host.weight is host.base_layer.weight
    assert host.bias is host.base_layer.bias
    assert host.kind == "conv"


class Standardised(nn.Conv2d):
    """A layer that does not convolve with its weight but with one made from it."""

    def forward(self, input):
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Standardised(2, 2, 3), "its forward is not torch's own"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3)), "its weight is computed anew"),
    ],
    ids=["own forward", "weight norm"],
)
def test_what_an_adapter_cannot_follow_is_refused_with_the_reason(layer, words):
    net = nn.ModuleDict({"conv": layer})
    with pytest.raises(TargetError, match=f"'conv', a .*which cannot carry an adapter: {words}"):
        deltaw.inject_adapter_in_model(deltaw.LoraConfig(target_modules=["conv"]), net)
    assert net["conv"] is layer
    transposed = nn.ModuleDict({"conv": nn.ConvTranspose1d(2, 2, 3)})
    with pytest.raises(TargetError, match="a ConvTranspose1d, which cannot carry an adapter"):
        deltaw.inject_adapter_in_model(deltaw.LoraConfig(target_modules=["conv"]), transposed)
