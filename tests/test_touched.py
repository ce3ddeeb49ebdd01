"""The pre-commit hooks: they run what ``make check`` runs, and find the tests of what changed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import touched
import yaml

ROOT = Path(__file__).resolve().parent.parent
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        (["deltaw/merge.py"], {"tests/test_merge.py"}),
        (["deltaw/data/render.py", "deltaw/cli/merge.py"], {"tests/data/test_render.py", "tests/cli/test_merge.py"}),
        (["examples/reviews/data.py"], {"tests/examples/test_reviews.py"}),
        (["tests/test_card.py", "tests/peer.py", "README.md"], {"tests/test_card.py"}),
        (["deltaw/no_such_file.py"], set()),
    ],
)
def test_a_file_finds_its_tests(changed, tests):
    assert set(touched.tests_of(changed)) == tests | {"tests/test_architecture.py"}


def test_the_front_of_a_package_finds_all_of_its_tests():
    found = touched.tests_of(["deltaw/evaluate/__init__.py"])
    assert {"tests/evaluate/test_metrics.py", "tests/evaluate/test_generate.py"} <= set(found)


def test_every_example_is_known():
    folders = {path.parent.name for path in (ROOT / "examples").glob("*/__init__.py")}
    assert set(touched.EXAMPLES) == folders
    for names in touched.EXAMPLES.values():
        assert all((ROOT / "tests" / "examples" / f"test_{name}.py").is_file() for name in names)


def test_hooks_are_local_and_run_the_tools_of_make_check():
    assert [repo["repo"] for repo in HOOKS] == ["local"]
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert check
    wanted = {line.strip().replace("$(BIN)/", "").split()[0] for line in check[1].splitlines()}
    entries = [shlex.split(hook["entry"]) for hook in HOOKS[0]["hooks"]]
    assert {Path(entry[0]).name for entry in entries} == wanted
    assert all(entry[0].startswith(".venv/bin/") for entry in entries)
    assert {"check", "format"} <= {entry[1] for entry in entries if entry[0].endswith("ruff")}
    for hook in HOOKS[0]["hooks"]:
        assert hook["language"] == "system"
        if "files" in hook:
            assert re.match(hook["files"], "deltaw/merge.py")
            assert not re.match(hook["files"], "README.md")
