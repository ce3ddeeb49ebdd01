"""Convolutions of all kinds, for property-based tests."""

import hypothesis.strategies as st
import torch

from deltaw.adapters.hosts.conv import CONVOLUTIONS

MODES = ["zeros", "reflect", "replicate", "circular"]


@st.composite
def convolutions(draw, groups=(1, 2, 3)):
    """(base, x) over dimensions, kernels, strides, paddings and their modes, dilations and groups."""
    n, g = draw(st.integers(1, 3)), draw(st.sampled_from(groups))
    sizes = lambda low, high: st.tuples(*[st.integers(low, high)] * n)  # noqa: E731
    mode = draw(st.sampled_from([m for m in MODES if m != "reflect" or n < 3]))
    stride = draw(sizes(1, 2))
    padding = draw(st.one_of(sizes(0, 2), st.just("valid"), *[st.just("same")] * (max(stride) == 1)))
    torch.manual_seed(draw(st.integers(0, 99)))
    base = CONVOLUTIONS[n](
        g * draw(st.integers(1, 2)),
        g * draw(st.integers(1, 2)),
        draw(sizes(1, 3)),
        stride,
        padding,
        draw(sizes(1, 2)),
        g,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return base, torch.randn(2, base.in_channels, *draw(sizes(5, 6)))
