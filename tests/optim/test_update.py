"""One flat step: torch's own in 32 bits; in 8 bits the paper's recipe, on every backend, and bitsandbytes' results."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bnb import bitsandbytes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltaw import AdamW8bit
from deltaw.optim.update import BLOCKSIZE, Rates, adamw_, adamw_8bit_
from deltaw.quant.backends import VARIABLE, backend_named
from deltaw.quant.codebooks import dynamic_map

CPU = torch.device("cpu")
RATES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    why = backend_named(request.param).unavailable(torch.device("cpu"))
    if why:
        pytest.skip(why)
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def by_the_paper(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW as Loshchilov and Hutter write it, in float64."""
    p, g, m, v = (x.double() for x in (p, g, m, v))
    b1, b2 = RATES["beta1"], RATES["beta2"]
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    m_hat, v_hat = m / (1 - b1**step), v / (1 - b2**step)
    lr = RATES["lr"]
    return p - lr * m_hat / (v_hat.sqrt() + RATES["eps"]) - lr * RATES["weight_decay"] * p, m, v


def nearest(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and absmax by trying all 256 values of the map; a last block may be short."""
    codes, absmax = [], []
    for block in values.split(BLOCKSIZE):
        absmax.append(block.abs().max().float())
        scaled = block.float() * (1 / absmax[-1]) if absmax[-1] > 0 else torch.zeros_like(block).float()
        codes.append((scaled[:, None] - dynamic_map(signed, CPU)).abs().argmin(1))
    return torch.cat(codes), torch.stack(absmax)


def read(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    return dynamic_map(signed, CPU)[codes.long()] * absmax.repeat_interleave(BLOCKSIZE)[: codes.numel()]


def states(n: int) -> list[Tensor]:
    blocks = -(-n // BLOCKSIZE)
    return [torch.zeros(size, dtype=kind) for size, kind in ((n, torch.uint8), (blocks, torch.float32)) * 2]


@given(n=st.integers(1, 700), steps=st.integers(1, 4))
def test_32_bits_are_torchs_own_step(n: int, steps: int) -> None:
    torch.manual_seed(n)
    ours, m, v = torch.randn(n), torch.zeros(n), torch.zeros(n)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(1, steps + 1):
        grad = theirs.grad = torch.randn(n)
        optimizer.step()
        want = by_the_paper(ours, grad, m, v, step)
        adamw_([ours], [grad], [m], [v], Rates(**RATES, step=step))
        for got, wanted in zip((ours, m, v), want, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000, 4096])
def test_8_bits_are_read_stepped_and_packed_again(n: int, backend: str) -> None:
    torch.manual_seed(n)
    values = torch.randn(n)
    codes_m, absmax_m, codes_v, absmax_v = kept = states(n)
    for step in range(1, 6):
        grads = torch.randn(n) * torch.rand(n).pow(3)
        m, v = read(codes_m, absmax_m, True), read(codes_v, absmax_v, False)
        want, want_m, want_v = by_the_paper(values, grads, m, v, step)
        adamw_8bit_(values, grads, *kept, rates=Rates(**RATES, step=step))
        torch.testing.assert_close(values.double(), want, rtol=1e-5, atol=1e-6)
        for wanted, codes, absmax, signed in ((want_m, codes_m, absmax_m, True), (want_v, codes_v, absmax_v, False)):
            best, most = nearest(wanted, signed)
            torch.testing.assert_close(absmax, most, rtol=1e-6, atol=0)
            # rounding in float32 may move a value over the middle between two codes, never further
            assert (codes.long() - best).abs().max() <= 1
            assert (codes.long() != best).double().mean() < 0.01 + 1 / n


def test_backends_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    why = backend_named("native").unavailable(torch.device("cpu"))
    if why:
        pytest.skip(why)
    n, results = 3000, []
    for name in ("reference", "native"):
        monkeypatch.setenv(VARIABLE, name)
        torch.manual_seed(0)
        values, kept = torch.randn(n), states(n)
        for step in range(1, 11):
            adamw_8bit_(values, torch.randn(n), *kept, rates=Rates(**RATES, step=step))
        results.append((values, kept))
    (one, kept_one), (other, kept_other) = results
    # a float32 rounding that moves a value over the middle of two codes moves one weight by less than a step
    assert (one - other).abs().max() < RATES["lr"]
    assert ((one - other).abs() > 1e-5).double().mean() < 0.01
    for a, b in zip(kept_one[::2], kept_other[::2], strict=True):
        assert (a != b).double().mean() < 0.01


def test_blocks_of_zeros_stay_zero(backend: str) -> None:
    values, kept = torch.ones(600), states(600)
    for step in range(1, 4):
        adamw_8bit_(values, torch.zeros(600), *kept, rates=Rates(**RATES | {"weight_decay": 0.0}, step=step))
    assert torch.equal(values, torch.ones(600))
    assert all(torch.equal(absmax, torch.zeros(3)) for absmax in kept[1::2])


def test_agrees_with_bitsandbytes() -> None:
    """Its kernel for CPUs looks codes up in a coarser table, so that some differ; the weights stay nearer to each other
    than either is to 32 bits."""
    torch.manual_seed(0)
    start = torch.randn(64, 300)
    ours, theirs, exact = (torch.nn.Parameter(start.clone()) for _ in range(3))
    optimizers = (
        AdamW8bit([ours], lr=1e-2, weight_decay=0.1),
        bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1),
    )
    for step in range(60):
        grad = torch.randn(64, 300) * torch.rand(64, 1)
        for parameter, optimizer in zip((ours, theirs, exact), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
        if step == 0:  # states are still exact when the first step is taken
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
            mine, other = optimizers[0].state[ours], optimizers[1].state[theirs]
            for i, name, signed in ((1, "exp_avg", True), (2, "exp_avg_sq", False)):
                codes, absmax = mine[name].view(-1), mine[f"{name}_absmax"]
                assert torch.equal(absmax, other[f"absmax{i}"])
                assert (codes != other[f"state{i}"].view(-1)).double().mean() < 0.1
                unit = torch.ones_like(absmax)
                apart = read(codes, unit, signed) - read(other[f"state{i}"].view(-1), unit, signed)
                assert apart.abs().max() < 0.015  # of the largest of its block

    def apart_from(one: Tensor, other: Tensor) -> float:
        return float((one - other).detach().norm() / (exact - start).detach().norm())

    assert apart_from(ours, theirs) < 0.01
    assert apart_from(ours, exact) < 1.1 * apart_from(theirs, exact) < 0.05


def test_error_of_8_bits_over_500_steps() -> None:
    """Two layers learn a noisy function in batches: the loss at the end and the way there, beside 32 bits."""
    torch.manual_seed(0)
    x = torch.randn(2048, 64)
    y = torch.sin(x @ torch.randn(64, 64) / 8) @ torch.randn(64, 16) / 8 + 0.2 * torch.randn(2048, 16)

    def learn(make: Callable[..., torch.optim.Optimizer]) -> tuple[float, Tensor, Tensor]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64), torch.nn.Tanh()
        )
        model.append(torch.nn.Linear(64, 16))
        start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.0)
        for step in range(500):
            optimizer.zero_grad()
            rows = slice(step % 16 * 128, step % 16 * 128 + 128)
            torch.nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = torch.nn.functional.mse_loss(model(x), y).item()
        return loss, start, torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    loss_32, start, end_32 = learn(torch.optim.AdamW)
    loss_8, _, end_8 = learn(AdamW8bit)
    assert loss_32 < 0.5 * y.var()
    assert math.isclose(loss_8, loss_32, rel_tol=0.03)
    assert (end_8 - end_32).norm() / (end_32 - start).norm() < 0.15
