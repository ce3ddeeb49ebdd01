"""docs/methods.md says what the code does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from matrix import LAYERS

from deltaw.adapterfields import AdapterFields
from deltaw.methods import METHODS


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    path = Path(__file__).parents[1] / "docs" / "methods_table.py"
    spec = importlib.util.spec_from_file_location("methods_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_file_is_up_to_date(writer):
    """Every cell is tried again; ``python docs/methods_table.py`` writes the file anew."""
    assert writer.FILE.read_text(encoding="utf-8") == writer.page()


def test_an_attempt_that_fails_is_told(writer):
    """The columns can say no: a refusal, and an update that has no place in the base."""
    assert writer.tried("lokr", "Embedding") is None
    assert writer.tried("lora", "grouped") == {"mixed batch": True, "merge": False, "compile": True}


def test_the_file_has_a_line_for_every_method_and_a_column_for_every_layer(writer):
    text = writer.FILE.read_text(encoding="utf-8")
    assert all(text.count(f"\n| `{name}` | ") == 2 for name in METHODS)
    assert all(head in text for head in writer.HEADS.values())
    assert writer.HEADS.keys() == LAYERS.keys()
    assert all(f"\n| `{key}` | " in text for key in AdapterFields.model_fields)
