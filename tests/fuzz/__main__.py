"""``python -m tests.fuzz``: tries hostile inputs by kind, and says how many and what they gave.

    python -m tests.fuzz [--tries 1000] [--seed 0] [--kinds "data rows" ...] [--write]

Stops at the first input that gives anything but a result or an error of ``deltaw.errors``, made small by hypothesis.
``--write`` puts the table into docs/hostile_input.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the helpers of the tests, by their bare names

from . import adapters, commands, configs, rows  # noqa: F401 (they register their kinds)
from .harness import KINDS, Tally, run_kind

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "hostile_input.md"
BEGIN, END = "<!-- counts -->", "<!-- /counts -->"
SLOW = {"command: run file": 10, "command: data": 5, "command: adapter": 10}  # tried that many times less often


def table(found: dict[str, Tally]) -> str:
    """A Markdown table, a line for each kind."""
    lines = ["| kind | input | tried | gave |", "| --- | --- | ---: | --- |"]
    for name, tally in found.items():
        gave = ", ".join(f"{outcome} {n:,}" for outcome, n in tally.outcomes.most_common())
        lines.append(f"| {name} | {KINDS[name][2]} | {tally.tried:,} | {gave} |")
    lines.append(f"| all | | {sum(tally.tried for tally in found.values()):,} | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Hostile input, counted.")
    parser.add_argument("--tries", type=int, default=1000, help="inputs of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--write", action="store_true", help="put the table into docs/hostile_input.md")
    options = parser.parse_args()
    logging.getLogger("deltaw").setLevel(logging.ERROR)
    found: dict[str, Tally] = {}
    for name in options.kinds:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run_kind(name, max(1, options.tries // SLOW.get(name, 1)), options.seed, Path(folder))
        print(f"{name}: {found[name].tried:,} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(found))
    if options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        head, rest = text.split(BEGIN)
        DOCUMENT.write_text(f"{head}{BEGIN}\n{table(found)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
