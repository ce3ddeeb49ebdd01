"""What the fuzzers share: a target is tried with an input, and what came of it is counted.

An input may be taken, or refused with an error of ``deltaw.errors``; anything else that is raised is a bug, and so is a
file of the user's that changed. Knows nothing of any one kind of input.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from deltaw.errors import DeltawError

__all__ = ["KINDS", "Tally", "attempt", "broken_bytes", "kind", "run_kind", "snapshot", "untouched", "values"]


@dataclass
class Tally:
    """How many inputs of a kind were tried, and what they gave."""

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def count(self, outcome: str) -> None:
        self.tried += 1
        self.outcomes[outcome] += 1


Target = Callable[[Any, Path, Tally], None]
#: name -> (strategy of inputs, target, what it is)
KINDS: dict[str, tuple[st.SearchStrategy[Any], Target, str]] = {}


def kind(name: str, inputs: st.SearchStrategy[Any], says: str) -> Callable[[Target], Target]:
    """Registers a target: ``target(input, folder, tally)``, with an empty folder for each input."""

    def register(target: Target) -> Target:
        KINDS[name] = (inputs, target, says)
        return target

    return register


def run_kind(name: str, tries: int, seed: int, folder: Path) -> Tally:
    """Tries a kind with ``tries`` inputs drawn by ``seed``.

    Raises:
        BaseException: the first input that gave neither a result nor an error of ours, made small by hypothesis.
    """
    inputs, target, _ = KINDS[name]
    tally = Tally()
    number = iter(range(10**9))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=tries,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def trial(value: Any) -> None:
        own = folder / f"{name}-{next(number)}"
        own.mkdir()
        target(value, own, tally)

    trial()
    return tally


def attempt(tally: Tally, act: Callable[[], Any]) -> Any:
    """What ``act`` returns; None where it raised an error of ours, which must say something."""
    try:
        result = act()
    except DeltawError as refused:
        name, said = type(refused).__name__, str(refused)
    else:
        tally.count("taken")
        return result
    assert said.strip(), f"{name} says nothing"
    assert len(said) < 20_000, f"{name} says {len(said):,} characters"
    tally.count(name)
    return None


# -- files -----------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, link and folder below, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        else:
            found[name] = "folder"
    return found


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing below ``folder`` is made, changed or removed meanwhile."""
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before, "a file of the user's was touched"


# -- inputs ----------------------------------------------------------------------------------------------------

CONTROL = ["<|im_end|>", "<|im_start|>", "<|im_start|>system\n", "<|im_", "end|>", "</s>", "{{ 7*7 }}", "{% for %}"]
STRINGS = st.one_of(
    st.text(max_size=20),
    st.sampled_from([*CONTROL, "", " ", "\x00", "\ud800", "a\udfffb", "\u202e", "\ufeff", "é" * 5, "x" * 3000]),
    st.lists(st.sampled_from([*CONTROL, "a", " ", "\n", "\ud83d"]), max_size=6).map("".join),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -1, 0, float("nan"), float("inf"), 1e-300, 2**63]),
    st.floats(),
    STRINGS,
)


def values(leaves: int = 8) -> st.SearchStrategy[Any]:
    """Anything that YAML or JSON can say."""
    return st.recursive(
        SCALARS,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(STRINGS, inner, max_size=4)),
        max_leaves=leaves,
    )


def broken_bytes(good: Callable[[], bytes]) -> st.SearchStrategy[bytes]:
    """A good file cut short, with bits flipped, bytes put in or taken out, or repeated; or no file at all."""

    def damage(seed: int, how: str, times: int) -> bytes:
        rng, data = random.Random(seed), bytearray(good())
        if how == "noise":
            return rng.randbytes(rng.randrange(200))
        if how == "cut":
            return bytes(data[: rng.randrange(len(data) + 1)])
        if how == "repeat":
            return bytes(data) * 2
        for _ in range(times):
            place = rng.randrange(len(data) + (how == "insert")) if data else 0
            if how == "flip" and data:
                data[place] ^= 1 << rng.randrange(8)
            elif how == "insert":
                data[place:place] = rng.choice([b"\x00", b"\xff", b"'", b"{", b"\n", b": ", b"- ", rng.randbytes(3)])
            elif how == "delete" and data:
                del data[place : place + rng.randrange(1, 9)]
        return bytes(data)

    hows = st.sampled_from(["flip", "insert", "delete", "cut", "repeat", "noise"])
    return st.builds(damage, st.integers(0, 2**32), hows, st.integers(1, 6))
