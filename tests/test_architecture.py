"""The house: imports go down only, every module is on the map, files stay small, optional packages stay in
their place."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import deltaw

ROOT = Path(deltaw.__file__).parent
MAP = ROOT.parent / "docs" / "architecture.md"

#: place -> floor. A place is a top-level module or package of deltaw; imports go to a lower floor.
FLOORS = {
    **dict.fromkeys(["errors", "guises", "modules", "devices", "weights", "scratch", "presets", "provenance"], 0),
    **dict.fromkeys(["methods", "footprint", "builtin"], 0),
    "atomic": 0,
    **dict.fromkeys(["held", "home", "workers"], 0),
    "findings": 1,
    **dict.fromkeys(["quant", "data", "ops", "loading", "fullweights"], 1),
    "optimizers": 1,
    **dict.fromkeys(["adapters", "optim"], 2),
    **dict.fromkeys(
        ["model", "tasks", "auto", "checkpoint", "statedict", "status", "merge", "merge_quantized", "card", "skeleton"],
        3,
    ),
    "kbit": 3,
    **dict.fromkeys(["plan", "evaluate", "analysis", "serve", "report", "integrations"], 4),
    **dict.fromkeys(["train", "verify"], 5),
    **dict.fromkeys(["config", "adapterfields", "datafields", "pipeline", "rundata", "fieldtypes", "runfile"], 6),
    "cli": 7,
}
#: imports between neighbours on one floor that are meant
NEIGHBOURS = {
    ("model", "checkpoint"),
    ("model", "merge"),
    ("model", "card"),
    ("merge_quantized", "merge"),
    ("model", "statedict"),
    ("model", "status"),
    ("model", "tasks"),  # inside a function: which subclass fits a config
    ("tasks", "model"),
    ("auto", "model"),
    ("auto", "tasks"),
    ("statedict", "checkpoint"),
    ("loading", "data"),  # chat templates by name
    ("data", "findings"),
    ("loading", "provenance"),
    ("loading", "quant"),
    ("pipeline", "config"),
    ("pipeline", "rundata"),
    ("rundata", "config"),
    ("config", "datafields"),
    ("datafields", "adapterfields"),
    ("datafields", "fieldtypes"),
    ("config", "fieldtypes"),
    ("config", "adapterfields"),
    ("adapterfields", "fieldtypes"),
    ("config", "runfile"),
}
#: packages that are not needed to `import deltaw` -> the places that may import them
OPTIONAL = {
    "peft": {"integrations"},
    "trl": {"integrations"},
    "bitsandbytes": {"integrations"},
    "triton": {"quant/triton_kernels.py"},
    "datasets": {"data/load.py"},
    "pyarrow": {"data/readers.py"},
    "matplotlib": {"report"},
    "gguf": {"loading.py"},
    "huggingface_hub": {"adapters/config.py", "loading.py"},
    "pydantic": {"config.py", "adapterfields.py", "datafields.py", "fieldtypes.py"},
    "yaml": {"config.py", "fieldtypes.py", "runfile.py"},
    "typer": {"cli"},
    "rich": {"cli", "train/progress.py"},
    "tokenizers": {"loading.py"},
}
CORE = {"torch", "transformers", "safetensors", "accelerate", "numpy"}
MOST_LINES = 400

FILES = sorted(ROOT.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def place(module: str) -> str:
    """``deltaw.data.load`` -> ``data``; the facade itself is the empty place."""
    return module.removeprefix("deltaw").lstrip(".").split(".")[0]


def module_of(path: Path) -> str:
    parts = ("deltaw", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(path: Path, *, at_module_level: bool = False) -> set[str]:
    """Full names of the modules that a file imports; imports for type checkers alone do not run and do not
    count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if at_module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{relative(path)}:{node.lineno} imports relatively; write the full name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                public = deltaw._PUBLIC.get(alias.name) if node.module == "deltaw" else None
                found.add(public or (inner if inner in MODULES else str(node.module)))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_every_module_is_on_a_floor():
    assert {place(name) for name in MODULES} - {""} <= FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_down(path):
    here = place(module_of(path))
    if not here:
        pytest.skip("the facade names every floor, and loads them when they are asked for")
    for name in imports(path):
        if not name.startswith("deltaw"):
            continue
        there = place(name)
        if not there:
            continue  # __version__
        down = FLOORS[there] < FLOORS[here]
        assert there == here or down or (here, there) in NEIGHBOURS, f"{relative(path)} imports {name}: upward"


def test_no_cycle_when_modules_load():
    graph = {
        module_of(path): {n for n in imports(path, at_module_level=True) if n in MODULES and n != module_of(path)}
        for path in FILES
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_other_packages_stay_in_their_place(path):
    known = CORE | OPTIONAL.keys() | set(sys.stdlib_module_names) | {"deltaw", "__future__"}
    for name in {n.split(".")[0] for n in imports(path)}:
        assert name in known, f"{relative(path)} imports {name}, which is no dependency"
        if name in OPTIONAL:
            allowed = any(relative(path) == at or relative(path).startswith(f"{at}/") for at in OPTIONAL[name])
            assert allowed, f"{relative(path)} imports {name}; only {sorted(OPTIONAL[name])} may"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_small_and_say_what_they_do(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES, f"{relative(path)} has {len(text.splitlines())} lines: split it"
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), f"{relative(path)} does not open with a docstring"


def test_the_map_lists_every_place():
    """Top-level modules and packages, and the files of ``adapters/``, each with one line on what it says."""
    rows = re.findall(r"^\|\s*(\d)\s*\|\s*`deltaw/([a-z_]+)(?:\.py|/)`\s*\|\s*(\S.*?)\s*\|$", MAP.read_text(), re.M)
    listed = {name: int(floor) for floor, name, _ in rows}
    there = {place(name) for name in MODULES} - {""}
    assert there <= listed.keys(), f"not on the map of docs/architecture.md: {sorted(there - listed.keys())}"
    assert listed == {name: FLOORS[name] for name in listed}
    text = MAP.read_text()
    for path in (ROOT / "adapters").rglob("[a-z]*.py"):
        name = path.relative_to(ROOT / "adapters").as_posix()
        assert f"`{name}`" in text, f"adapters/{name} is not described in docs/architecture.md"


def test_tests_mirror_the_package():
    """Each test file of a folder that mirrors the package is named after what it tests."""
    tests = Path(__file__).parent
    for package in ("adapters", "ops"):
        for path in (tests / package).rglob("test_*.py"):
            place = path.relative_to(tests).with_name(path.name.removeprefix("test_"))
            assert (ROOT / place).exists(), f"{path} tests no file"
