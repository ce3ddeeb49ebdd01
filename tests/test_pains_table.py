"""docs/check.md: every finding and every data set stands there; what TRL does with them is found by running it."""

import importlib.util
import sys
from pathlib import Path

import pytest
from pains import PAINS


@pytest.fixture(scope="module")
def table():
    path = Path(__file__).parents[1] / "docs" / "pains_table.py"
    spec = importlib.util.spec_from_file_location("pains_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for themselves there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_file_is_up_to_date(table):
    """Every data set is handed to TRL again; ``python docs/pains_table.py`` writes the file anew."""
    assert table.FILE.read_text(encoding="utf-8") == table.page()


@pytest.mark.filterwarnings("ignore")
def test_what_trl_does_is_found_by_running_it(table):
    """The columns can say yes and no: a data set it does right by, one it trains on, one it falls over."""
    chosen = {pain.name: pain for pain in PAINS}
    kinds = {name: table.trl(chosen[name]).kind for name in ("pad = eos", "commands in rows", "one bad row")}
    assert kinds == {"pad = eos": "right", "commands in rows": "silent", "one bad row": "caught"}


def test_the_file_lists_every_finding_and_every_data_set(table):
    text = table.FILE.read_text(encoding="utf-8")
    assert table.findings_table() in text, "python docs/pains_table.py"
    for pain in PAINS:
        assert f"| {pain.says} | " in text
        if pain.finding not in ("", "refused"):
            assert f"`{pain.finding}`" in text
    assert f"Of all {len(PAINS)} data sets" in text
