"""The quick tests of files that changed: ``python -m tests.touched FILE ...``, for the pre-commit hook.

Tests mirror the package path by path, so a file's tests are found by its name; the map of the house is always held.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main", "tests_of"]

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {"text_to_sql": ("text_to_sql", "demo", "hard", "methods"), "reviews": ("reviews",), "article": ("article",)}


def tests_of(files: Sequence[str]) -> list[str]:
    """The test files of ``files``, relative to the repository's root, each once and in order."""
    found = {"tests/test_architecture.py"}
    for name in files:
        top, *inside = Path(name).parts
        if not inside:
            continue
        folder, stem = Path(*inside).parent, Path(name).stem
        if top == "tests":
            found.add(name if stem.startswith("test_") else "")
        elif top == "examples":
            found |= {f"tests/examples/test_{one}.py" for one in EXAMPLES.get(inside[0], ())}
        elif top == "deltaw":
            found |= {(Path("tests") / folder / f"test_{stem}.py").as_posix()}
            if stem == "__init__":  # a package's front: all of its own tests
                found |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / folder).glob("test_*.py")}
    return sorted(name for name in found if name and (ROOT / name).is_file())


def main(files: Sequence[str]) -> int:
    """Runs them; returns pytest's status. A file whose tests are all slow is no failure."""
    status = subprocess.call([sys.executable, "-m", "pytest", "-m", "not slow", *tests_of(files)], cwd=ROOT)
    return 0 if status == 5 else status  # 5: nothing was left to run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
