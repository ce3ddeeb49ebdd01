"""Files that are whole or not there: what a failure leaves, what is flushed, and in which order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deltaw import atomic


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made" / "a.json"
    atomic.write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="space"):
        atomic.write_text(path, "b")
    assert path.read_text(encoding="utf-8") == "ä"
    assert names(tmp_path) == ["made", "made/a.json"]


def test_the_disk_has_a_file_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        happened.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        happened.append(("rename", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    atomic.write_text(tmp_path / "a", "text")
    assert happened == [("flush", f".a.{os.getpid()}.part"), ("rename", "a"), ("flush", tmp_path.name)]
    happened.clear()
    with atomic.publishing(tmp_path / "out") as staged:
        for name in ("adapter_config.json", "weights", "other/adapter_config.json"):
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_text("new")
    flushes = [name for act, name in happened[: [act for act, _ in happened].index("rename")]]
    assert {"adapter_config.json", "weights", "other", ".saving.part"} <= set(flushes)
    assert [name for act, name in happened if act == "rename"][-1] == "adapter_config.json"
    assert names(tmp_path / "out") == ["adapter_config.json", "other", "other/adapter_config.json", "weights"]


@pytest.mark.parametrize("at", range(8))
def test_old_and_new_are_never_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stopped before the n-th removal or rename, a folder with its config is all old or all new."""
    files = ("adapter_config.json", "chat_template.jinja", "weights")
    for name in files:
        (tmp_path / name).write_text("old")
    left = at

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def act(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return act

    for act in ("unlink", "replace"):
        monkeypatch.setattr(os, act, counted(getattr(os, act)))
    try:
        with atomic.publishing(tmp_path) as staged:
            for name in files:
                (staged / name).write_text("new")
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    found = {name: (tmp_path / name).read_text() for name in files if (tmp_path / name).exists()}
    if "adapter_config.json" in found:
        assert found in (dict.fromkeys(files, "old"), dict.fromkeys(files, "new"))
    if at >= 4:  # one removal and three renames
        assert set(found.values()) == {"new"}


def test_a_failure_while_writing_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")

    def fails() -> None:
        with atomic.publishing(tmp_path) as staged:
            (staged / "config.json").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert (tmp_path / "config.json").read_text() == "old"
    assert names(tmp_path) == ["config.json"]


def test_a_card_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for _ in range(2):
        with atomic.publishing(tmp_path) as staged:
            for name in ("README.md", "weights"):
                (staged / name).write_text("new")
    assert (tmp_path / "README.md").read_text() == "mine"
    assert names(tmp_path) == ["README.md", "weights"]
