"""Passing for another library's class: only once that library is imported, and only to ``isinstance``."""

from __future__ import annotations

import copy
import pickle
import sys
from types import ModuleType

import pytest

from deltaw import guises


class Theirs:
    def sing(self) -> str:
        return "theirs"


class Ours(guises.Guised):
    def __init__(self) -> None:
        self.note = [1]


class OursToo(guises.Guised):
    def __init__(self) -> None:
        super().__init__()  # finds its class though __class__ is another


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {Ours: type("Both", (Ours, Theirs), {})}
    monkeypatch.setattr(guises, "_makers", {})
    guises.register("some_library", lambda own: both.get(own, own))


def test_it_is_itself_until_the_library_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Ours()
    assert ours.__class__ is Ours
    assert not isinstance(ours, Theirs)
    monkeypatch.setitem(sys.modules, "some_library", ModuleType("some_library"))
    assert isinstance(ours, Theirs)
    assert isinstance(ours, Ours)
    assert type(ours) is Ours
    assert not hasattr(ours, "sing")
    assert not isinstance(OursToo(), Theirs)
    monkeypatch.setitem(sys.modules, "some_library", None)  # how a missing package looks
    assert not isinstance(ours, Theirs)


def test_copies_and_pickles_stay_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_library", ModuleType("some_library"))
    ours = Ours()
    for twin in (copy.copy(ours), copy.deepcopy(ours)):
        assert type(twin) is Ours
        assert twin.note == [1]
    assert copy.copy(ours).note is ours.note is not copy.deepcopy(ours).note
    assert pickle.loads(pickle.dumps(ours)).note == [1]


def test_its_class_can_be_changed() -> None:
    ours = Ours()
    ours.__class__ = OursToo
    assert type(ours) is OursToo
