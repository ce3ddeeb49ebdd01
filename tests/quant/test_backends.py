"""Which kernels are taken, and what is said about it."""

import logging
from types import SimpleNamespace

import pytest
import torch

from deltaw.errors import ConfigError
from deltaw.quant import backends, nf4, quantize_4bit
from deltaw.quant.backends import BACKENDS, VARIABLE, Kernels, backend_for, backend_named

CPU = torch.device("cpu")
FUNCTIONS = [name for name in vars(Kernels) if not name.startswith("_")]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    backends._chosen.cache_clear()
    yield
    backends._chosen.cache_clear()


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_has_every_function(name):
    kernels = backend_named(name)
    assert len(FUNCTIONS) == 6
    assert all(callable(getattr(kernels, function)) for function in FUNCTIONS)


def test_the_reference_runs_everywhere():
    assert list(BACKENDS)[-1] == "reference"
    assert backend_named("reference") is nf4
    for device in ("cpu", "meta", "cuda"):
        assert nf4.unavailable(torch.device(device)) == ""


def test_a_weight_without_values_needs_no_kernels(caplog):
    caplog.set_level(logging.WARNING, "deltaw")
    assert backend_for(torch.device("meta")) is nf4
    assert not caplog.records


def test_one_is_forced(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert backend_for(CPU) is nf4


def test_another_value_takes_effect_at_once(monkeypatch):
    taken = backend_for(CPU)
    monkeypatch.setenv(VARIABLE, "reference")
    assert backend_for(CPU) is nf4
    monkeypatch.delenv(VARIABLE)
    assert backend_for(CPU) is taken


def test_a_name_that_there_is_not(monkeypatch):
    monkeypatch.setenv(VARIABLE, "referenc")
    with pytest.raises(ConfigError, match=rf"{VARIABLE}='referenc': no such backend.*did you mean 'reference'"):
        quantize_4bit(torch.ones(64))


def only(monkeypatch, **whys: str) -> None:
    """Backends that cannot run, for the reasons given, before the reference."""
    names = dict.fromkeys(whys) | {"reference": BACKENDS["reference"]}
    fakes = {name: SimpleNamespace(unavailable=lambda device, why=why: why) for name, why in whys.items()}
    monkeypatch.setattr(backends, "BACKENDS", names)
    monkeypatch.setattr(backends, "backend_named", lambda name: fakes.get(name, nf4))


def test_one_that_is_forced_but_cannot_run(monkeypatch):
    only(monkeypatch, fast="no compiler was there")
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ConfigError, match=rf"{VARIABLE}=fast: it cannot run on cpu: no compiler was there"):
        backend_for(CPU)


def test_falling_back_is_said_once(monkeypatch, caplog):
    only(monkeypatch, fast="no compiler was there", other="no GPU")
    caplog.set_level(logging.WARNING, "deltaw")
    for _ in range(3):
        assert backend_for(CPU) is nf4
    (record,) = caplog.records
    for part in ("plain PyTorch", "slow", "fast: no compiler was there", "other: no GPU"):
        assert part in record.getMessage()


def test_the_first_that_can_run_is_taken(monkeypatch, caplog):
    only(monkeypatch, broken="no GPU", fast="")
    assert backend_for(CPU).unavailable(CPU) == ""
    assert backend_for(CPU) is not nf4
    assert not caplog.records
