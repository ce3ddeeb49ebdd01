"""The table of optimizers: every name of transformers, every class ours, arguments read by their types."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from transformers.training_args import OptimizerNames

import deltaw.optim
from deltaw.config import load_run_config
from deltaw.errors import ConfigError
from deltaw.optim import state_bytes
from deltaw.optimizers import OPTIMIZERS, OTHERS, argument_faults, arguments_of, name_fault


def test_every_name_of_transformers_is_known() -> None:
    theirs = {name.value for name in OptimizerNames}
    assert theirs | {"paged_adamw"} == {*OPTIMIZERS, *OTHERS}
    assert not set(OPTIMIZERS) & set(OTHERS)


@pytest.mark.parametrize("name", [name for name, one in OPTIMIZERS.items() if one.made])
def test_the_table_says_what_the_classes_do(name: str) -> None:
    one = OPTIMIZERS[name]
    make = getattr(deltaw.optim, one.made, None) or getattr(torch.optim, one.made)
    taken = inspect.signature(make).parameters
    assert set(one.arguments) <= taken.keys()
    param = torch.nn.Parameter(torch.ones(512, 1024))
    param.grad = torch.ones_like(param)
    optimizer = make([param], lr=1e-3)
    optimizer.step()
    assert state_bytes(optimizer).total == param.numel() * one.bytes_kept


def test_arguments_are_read_by_their_types() -> None:
    assert arguments_of("sgd", " momentum=0.9, nesterov=True,") == {"momentum": 0.9, "nesterov": True}
    assert arguments_of("paged_adamw_8bit", "page_dir=/a/b c,paged_from=0") == {"page_dir": "/a/b c", "paged_from": 0}
    assert arguments_of("adamw_8bit", None) == {}
    assert argument_faults("adamw_torch_fused", "momentum=0.9") == [
        "adamw_torch_fused takes no argument 'momentum'; it takes none"
    ]
    assert argument_faults("sgd", "momentun=1,nesterov=maybe,dampening=") == [
        "sgd takes no argument 'momentun'; did you mean 'momentum'?",
        "nesterov = 'maybe' is no bool",
        "dampening = '' is no float",
    ]
    assert argument_faults("galore_adamw", "rank=64") == []  # transformers reads those
    with pytest.raises(ValueError, match=r"optim_args = 'x=1'"):
        arguments_of("sgd", "x=1")


def test_a_wrong_name_is_found_before_any_weight_loads() -> None:
    assert name_fault("paged_adamw_8bit") == ""
    assert name_fault("adamw_8bits").startswith("no such optimizer; did you mean 'adamw_8bit'")
    assert "there are adamw_torch_fused" in name_fault("zzz")
    given = {"model_name_or_path": "m", "dataset_name": "d"}
    with pytest.raises(
        ConfigError, match="optim = 'paged_adam_8bit': no such optimizer; did you mean 'paged_adamw_8bit'"
    ):
        load_run_config(None, given | {"optim": "paged_adam_8bit"})
    with pytest.raises(ConfigError, match=r"optim_args = 'momentum=0.9': adamw_8bit takes no argument 'momentum'"):
        load_run_config(None, given | {"optim": "adamw_8bit", "optim_args": "momentum=0.9"})
    assert load_run_config(None, given).optim == "adamw_torch_fused"


def test_the_table_is_light() -> None:
    code = "import sys, deltaw.optimizers; print({'torch', 'transformers', 'numpy'} & set(sys.modules) or 'light')"
    assert "light" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
