"""The catalogue of methods against the configs and the registry that it speaks of."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import deltaw
from deltaw.adapters import ADAPTERS, CONFIGS
from deltaw.adapters.methods.init import known_initialiser
from deltaw.methods import INITIALISERS, METHODS

SMALLEST = {"AdaLoraConfig": {"total_step": 10}}  # what a config cannot be made without


def config(name: str):
    method = METHODS[name]
    return getattr(deltaw, method.config)(**SMALLEST.get(method.config, {}), **method.fixes)


def test_it_needs_nothing_heavy():
    code = "import sys, deltaw.methods; print({'torch', 'pydantic', 'rich', 'yaml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_registry_and_is_described(name):
    method, made = METHODS[name], config(name)
    assert made.method in ADAPTERS
    assert type(made) in CONFIGS.values()
    for key, value in method.fixes.items():
        assert getattr(made, key) == value
        assert getattr(type(made)(**SMALLEST.get(method.config, {})), key) != value  # it says something
    assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv)
    assert re.search(r"\d{4}$", method.paper)
    for line in (method.what, method.when):
        assert 20 < len(line) < 110
        assert "\n" not in line


def test_every_adapter_of_the_registry_is_in_the_catalogue():
    assert {config(name).method for name in METHODS} == set(ADAPTERS)


def test_no_two_methods_are_the_same():
    said = [(method.config, tuple(method.fixes.items())) for method in METHODS.values()]
    assert len(set(said)) == len(said)


def test_initialisers_exist_and_are_no_methods():
    named = {method.fixes.get("init_lora_weights") for method in METHODS.values()}
    assert not named & INITIALISERS.keys()
    assert all(known_initialiser(name) for name in INITIALISERS)


@pytest.mark.parametrize(
    ("name", "key", "value", "allowed"),
    [
        ("pissa", "init_lora_weights", "pissa", True),
        ("pissa", "init_lora_weights", "pissa_niter_4", True),
        ("pissa", "init_lora_weights", "pissant", False),
        ("pissa", "init_lora_weights", True, False),
        ("dora", "use_dora", False, False),
        ("dora", "use_rslora", True, True),
    ],
)
def test_what_a_method_fixes(name, key, value, allowed):
    assert METHODS[name].allows(key, value) is allowed
