"""A short round of every fuzzer, the same inputs each time; ``python -m tests.fuzz`` is the long one."""

from __future__ import annotations

import logging

import pytest
from fuzz import adapters, commands, configs, harness, rows  # all but the harness register kinds
from fuzz.__main__ import BEGIN, DOCUMENT, END
from fuzz.harness import KINDS, Tally, run_kind

from deltaw.errors import DataError

TRIES = {"command: run file": 8, "command: data": 8, "command: adapter": 4, "config text": 20}
#: kinds whose inputs are all broken, so that none is taken
ALWAYS_REFUSED = {"command: adapter"}


@pytest.fixture(autouse=True)
def _unlogged():
    """Half characters of the inputs reach the log, and pytest's workers cannot send those on."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", KINDS)
def test_every_input_is_taken_or_refused_in_words(name, tmp_path):
    tries = TRIES.get(name, 50)
    tally = run_kind(name, tries, seed=1, folder=tmp_path)
    assert tally.tried >= min(tries, 15) or name.startswith("command")
    assert set(tally.outcomes) - {"taken"} or name == "control tokens"
    assert tally.outcomes["taken"] or name in ALWAYS_REFUSED


def test_all_fuzzers_are_here():
    assert {module.__name__.rpartition(".")[2] for module in (adapters, commands, configs, rows)} == {
        target.__module__.rpartition(".")[2] for _, target, _ in KINDS.values()
    }


def test_the_harness_sees_another_error_and_a_touched_file(tmp_path):
    """A fuzzer that cannot fail proves nothing."""
    tally = Tally()
    assert harness.attempt(tally, lambda: "result") == "result"

    def refuse(text: str):
        raise DataError(text)

    assert harness.attempt(tally, lambda: refuse("what, why, cure")) is None
    assert tally.outcomes == {"taken": 1, "DataError": 1}
    with pytest.raises(AssertionError, match="says nothing"):
        harness.attempt(tally, lambda: refuse("  "))
    with pytest.raises(ZeroDivisionError):
        harness.attempt(tally, lambda: 1 / 0)
    (tmp_path / "a").write_text("a")
    for touch in (
        lambda: (tmp_path / "a").write_text("b"),
        lambda: (tmp_path / "new").touch(),
        lambda: (tmp_path / "a").unlink(),
    ):
        with pytest.raises(AssertionError, match="touched"), harness.untouched(tmp_path):
            touch()


def test_a_control_token_that_slips_through_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr("deltaw.data.guard.Guard.over", lambda *arguments, **more: None)
    with pytest.raises(AssertionError, match="became a control token"):
        run_kind("control tokens", 30, seed=1, folder=tmp_path)


def test_a_traceback_on_the_command_line_is_a_failure(monkeypatch):
    monkeypatch.setattr(commands, "main", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        commands.run([], Tally())
    monkeypatch.setattr(commands, "main", lambda arguments: print("Traceback (most recent call last):"))
    with pytest.raises(AssertionError, match="Traceback"):
        commands.run([], Tally())


def test_the_document_has_a_line_for_every_kind():
    text = DOCUMENT.read_text(encoding="utf-8")
    counted = text.partition(BEGIN)[2].partition(END)[0]
    for name in KINDS:
        assert f"| {name} |" in counted, f"{name}: run python -m tests.fuzz --write"
