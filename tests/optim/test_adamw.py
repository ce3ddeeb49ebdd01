"""The optimizers as a training loop meets them: torch's weights, files that resume bitwise, clear errors."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deltaw import AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
from deltaw.errors import CheckpointError, ConfigError
from deltaw.optim import state_bytes
from deltaw.optim.buckets import CHUNK
from deltaw.quant.backends import VARIABLE, backend_named

Make = Callable[..., torch.optim.Optimizer]
SHAPES = [(64, 100), (5, 7), (300,), (1, 1), (4096,), (4095,), (0, 3), (70, 90)]
ALL = [AdamW8bit, PagedAdamW32bit, PagedAdamW8bit]


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def run(
    make: Make,
    steps: int = 4,
    *,
    params: list[nn.Parameter] | None = None,
    begin: int = 0,
    load: Any = None,
    **kwargs: Any,
) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Steps ``begin`` to ``steps`` with gradients that depend on the step only."""
    params = parameters() if params is None else params
    optimizer = make(params, **{"lr": 1e-2, "weight_decay": 0.1, **kwargs})
    if load is not None:
        optimizer.load_state_dict(load)
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return params, optimizer


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def saved(optimizer: torch.optim.Optimizer) -> Any:
    """Its state dict through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("paged_from", [0, 4000, 100_000])
def test_paged_32_bits_are_torchs_weights(paged_from: int, tmp_path: Path) -> None:
    ours, _ = run(PagedAdamW32bit, 10, paged_from=paged_from, page_dir=tmp_path)
    theirs, _ = run(torch.optim.AdamW, 10, fused=True)
    assert same(ours, theirs)
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_8_bits_do_not_depend_on_where_or_beside_whom(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why := backend_named(backend).unavailable(torch.device("cpu")):
        pytest.skip(why)
    monkeypatch.setenv(VARIABLE, backend)
    ours, optimizer = run(AdamW8bit)
    for make in (PagedAdamW8bit, lambda p, **k: PagedAdamW8bit(p, paged_from=0, **k)):
        paged, other = run(make)
        assert same(ours, paged)
        mine, others = optimizer.state_dict()["state"], other.state_dict()["state"]
        for i, state in mine.items():
            assert all(torch.equal(state[key], others[i][key]) for key in state if key != "step")
    for i, shape in enumerate(SHAPES):
        alone = parameters()[i : i + 1]
        optimizer = AdamW8bit(alone, lr=1e-2, weight_decay=0.1)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            grads = [torch.randn(one, generator=generator) for one in SHAPES]
            alone[0].grad = grads[i]
            optimizer.step()
        assert torch.equal(alone[0], ours[i]), shape
    monkeypatch.setitem(CHUNK, "cpu", 1024)
    assert same(run(AdamW8bit)[0], ours)


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6),
    missing=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 2))),
)
def test_any_shapes_with_gradients_now_and_then(shapes: list[tuple[int, ...]], missing: set[tuple[int, int]]) -> None:
    """A parameter without a gradient is left alone, and counts its own steps, as torch has it."""
    results = []
    for make in (
        lambda p: PagedAdamW32bit(p, lr=1e-2),
        lambda p: AdamW8bit(p, lr=1e-2, min_8bit_size=10**9),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    ):
        params = parameters(shapes)
        optimizer = make(params)
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = None if (i, step) in missing else torch.full_like(param, 0.5 + i - step)
            optimizer.step()
        results.append(params)
    assert same(results[0], results[2])
    assert same(results[1], results[2])


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_updated_in_float32(make: Make, dtype: torch.dtype) -> None:
    half, optimizer = run(make, 1, params=parameters(dtype=dtype), min_8bit_size=1)
    wide = [nn.Parameter(param.float()) for param in parameters(dtype=dtype)]
    generator = torch.Generator().manual_seed(0)
    for param in wide:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype).float()
    make(wide, lr=1e-2, weight_decay=0.1, min_8bit_size=1).step()
    assert same(half, [param.to(dtype) for param in wide])
    kinds = {value.dtype for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)}
    assert kinds <= {torch.uint8, torch.float32}


@pytest.mark.parametrize("make", ALL)
def test_parameters_and_gradients_that_are_not_contiguous(make: Make) -> None:
    shapes = [(30, 200), (12, 9), (9, 700)]
    straight = [nn.Parameter(p.detach().t().contiguous()) for p in parameters(shapes)]
    turned = [nn.Parameter(p.detach().t()) for p in parameters(shapes)]
    assert not turned[0].is_contiguous()
    results = []
    for params in (straight, turned):
        optimizer = make(params, lr=1e-2)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for param in params:
                grad = torch.randn(param.t().shape, generator=generator).t()
                param.grad = grad.contiguous() if step else grad
            optimizer.step()
        results.append(params)
    assert same(*results)


@pytest.mark.parametrize("make", ALL)
def test_small_and_named_parameters_keep_32_bits(make: Make) -> None:
    params = parameters([(64, 64), (4095,), (64, 65)])
    _, optimizer = run(make, 1, params=params, keep_float32=params[2:])
    kinds = [optimizer.state[param]["exp_avg"].dtype for param in params]
    assert kinds == [torch.float32 if make is PagedAdamW32bit else torch.uint8, torch.float32, torch.float32]


@pytest.mark.parametrize("make", ALL)
def test_resumes_bitwise(make: Make) -> None:
    straight, last = run(make, 6, paged_from=5000)
    halfway, optimizer = run(make, 3, paged_from=5000)
    again, resumed = run(make, 6, params=halfway, begin=3, load=saved(optimizer), paged_from=5000)
    assert same(straight, again)
    for a, b in zip(last.state.values(), resumed.state.values(), strict=True):
        assert a["step"] == b["step"] == 6
        assert all(torch.equal(a[key], b[key]) for key in a if key != "step")


def test_32_bit_states_pass_to_torch_and_back() -> None:
    straight, torchs = run(torch.optim.AdamW, 6, fused=True)
    theirs_alone = {
        "param_groups": torchs.state_dict()["param_groups"]
    }  # how torch computes is a setting of its groups
    halfway, ours = run(PagedAdamW32bit, 2, paged_from=0)
    between, theirs = run(torch.optim.AdamW, 4, params=halfway, begin=2, load=saved(ours) | theirs_alone)
    again, _ = run(
        PagedAdamW32bit, 6, params=between, begin=4, load=saved(theirs) | {"param_groups": saved(ours)["param_groups"]}
    )
    assert same(straight, again)


def test_states_are_saved_at_their_size() -> None:
    params = parameters([(1000, 300), (64, 100)])
    for make in ALL:
        _, optimizer = run(make, 1, params=params)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        assert file.tell() < state_bytes(optimizer).total + 20_000


def test_groups_have_their_own_settings() -> None:
    for make in (
        lambda g: AdamW8bit(g, lr=1e-2, min_8bit_size=10**9),
        lambda g: torch.optim.AdamW(g, lr=1e-2, fused=True),
    ):
        params = parameters([(20, 20)] * 3)
        optimizer = make([{"params": params[:1], "weight_decay": 0.5}, {"params": params[1:2], "lr": 0.1}])
        optimizer.add_param_group({"params": params[2:], "betas": (0.5, 0.5)})
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5  # what a schedule does
        if make.__code__.co_names[0] == "AdamW8bit":
            ours = params
    assert same(ours, params)


@pytest.mark.parametrize("make", ALL)
def test_whoever_watches_a_parameter_sees_it_change(make: Make) -> None:
    """A value remembered for a parameter (``adapters/memo.py``) is stamped with its version."""
    params = parameters([(64, 100), (700, 500), (3,)])
    for param in params:
        param.grad = torch.ones_like(param)
    before = [param._version for param in params]
    make(params).step()
    assert all(param._version > version for param, version in zip(params, before, strict=True))


def test_a_closure_gives_the_loss() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW8bit([param])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (param < 1).all()


def test_bytes_are_measured() -> None:
    n = 512 * 1024
    for make, each, paged in (
        (AdamW8bit, 2 + 8 / 256, False),
        (PagedAdamW32bit, 8, True),
        (PagedAdamW8bit, 2 + 8 / 256, True),
    ):
        _, optimizer = run(make, 1, params=parameters([(512, 1024)]))
        told = state_bytes(optimizer)
        assert told.total == n * each
        assert told.paged == (told.total if paged else 0)
        assert ("paged" in str(told)) == paged
    assert state_bytes(run(torch.optim.SGD, 1)[1]).total == 0
    assert state_bytes(AdamW8bit(parameters())).total == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"AdamW8bit: lr = -1.*betas = \(0.9, 1.5\)"):
        AdamW8bit(parameters(), lr=-1, betas=(0.9, 1.5))
    with pytest.raises(ConfigError, match=r"\(3,\) is torch.float64.*torch.optim.AdamW"):
        AdamW8bit([nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    with pytest.raises(ConfigError, match=r"page_dir = .*gone.* is no folder"):
        PagedAdamW8bit(parameters(), page_dir="gone")
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="a gradient is sparse"):
        AdamW8bit(table.parameters()).step()
    assert PagedAdamW is PagedAdamW32bit


def test_states_of_another_optimizer_are_refused() -> None:
    _, optimizer = run(AdamW8bit, 1)
    before = saved(optimizer)
    with pytest.raises(CheckpointError, match=r"not of PagedAdamW32bit(.|\n)*exp_avg is torch.uint8"):
        run(PagedAdamW32bit, 1, load=before)
    with pytest.raises(CheckpointError, match="exp_avg_absmax is missing"):
        run(AdamW8bit, 1, load=saved(run(PagedAdamW32bit, 1)[1]))
    wrong = saved(optimizer)
    wrong["state"][0]["exp_avg"] = torch.zeros(64, 99, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"not torch.uint8 \(64, 100\)"):
        optimizer.load_state_dict(wrong)
    assert same([before["state"][0]["exp_avg"]], [optimizer.state_dict()["state"][0]["exp_avg"]])  # nothing was touched
    with pytest.raises(ValueError, match="parameter group"):
        AdamW8bit(parameters()[:2]).load_state_dict(before)
