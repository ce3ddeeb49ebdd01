"""``python -m tests.fuzz.coverage``: the byte-level targets under atheris, which follows the branches that it reaches.

atheris is no dependency of deltaw's: where it is missing, this says so and leaves with status 2.

    python -m tests.fuzz.coverage {config,weights,rows} [libFuzzer options, such as -runs=100000]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the helpers of the tests, by their bare names

from .harness import Tally

__all__ = ["main"]


def _targets() -> dict[str, Callable[[bytes, Path, Tally], None]]:
    from . import adapters, configs, rows

    return {
        "config": configs.config_bytes,
        "weights": lambda data, folder, tally: adapters.weights(("lora", data), folder, tally),
        "rows": lambda data, folder, tally: rows.data_files((".jsonl", data), folder, tally),
    }


def main(arguments: Sequence[str]) -> int:
    """The program; returns its exit status."""
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError:
        print("error: fuzzing by coverage needs the package 'atheris': pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["deltaw", "yaml"]):
        targets = _targets()
    if not arguments or arguments[0] not in targets:
        print(f"error: name one of {', '.join(targets)}", file=sys.stderr)
        return 2
    target, tally = targets[arguments[0]], Tally()

    def one(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target(data, Path(folder), tally)

    atheris.Setup(["fuzz", *arguments[1:]], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
