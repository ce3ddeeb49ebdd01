"""The folders of checkpoints: complete or not taken for one; found, recovered, thinned out; killed at each write."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import killing
import pytest

from deltaw.errors import CheckpointError, ConfigError
from deltaw.train import checkpoints
from deltaw.train.checkpoints import MARK, fault_of, newest, prune, recover, resolve, writing


def write(run: Path, step: int, *, resumable: bool = True) -> Path:
    with writing(run, step, resumable=resumable) as folder:
        (folder / "weights").write_bytes(b"w" * step)
        (folder / "deep").mkdir()
        (folder / "deep" / "states").write_text("s")
    return run / f"checkpoint-{step}"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_a_checkpoint_says_what_it_is_made_of(tmp_path: Path) -> None:
    place = write(tmp_path / "run", 5)
    mark = json.loads((place / MARK).read_text())
    assert mark["files"] == {"deep/states": 1, "weights": 5}
    assert (mark["step"], mark["resumable"]) == (5, True)
    assert fault_of(place) is None
    (place / "notes.txt").write_text("a file of mine")
    assert fault_of(place) is None
    assert names(tmp_path / "run") == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda p: (p / MARK).unlink(), "cut short"),
        (lambda p: (p / MARK).write_text("{"), "cannot be read"),
        (lambda p: (p / MARK).write_text('{"files": [], "resumable": true}'), "cannot be read"),
        (lambda p: (p / "weights").write_bytes(b"w"), r"weights \(1 bytes, not 5\)"),
        (lambda p: (p / "deep" / "states").unlink(), r"deep/states \(no bytes, not 1\)"),
    ],
)
def test_what_is_not_complete_is_not_taken(tmp_path: Path, harm, told: str) -> None:
    first, last = write(tmp_path, 2), write(tmp_path, 5)
    harm(last)
    assert newest(tmp_path) == first
    with pytest.raises(CheckpointError, match=told) as caught:
        resolve(str(last), tmp_path)
    assert str(first) in str(caught.value)
    said: list[str] = []
    assert resolve("auto", tmp_path, said.append) == resolve(True, tmp_path) == first
    assert f"going on from {first}" in said
    assert any(str(last) in line for line in said)
    assert last.is_dir()  # not ours to delete


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    said: list[str] = []
    assert resolve(None, tmp_path) is None
    assert resolve(False, tmp_path) is None
    assert resolve("auto", tmp_path / "no", said.append) is None
    assert "starting anew" in said[0]
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        resolve(True, tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(tmp_path / "no", tmp_path)


def test_steps_are_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-200").write_text("a file")
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with writing(tmp_path, 3) as folder:
        (folder / "weights").write_text("new")
    assert names(tmp_path / "checkpoint-3") == [MARK, "weights"]
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_leaves_the_older_ones(tmp_path: Path, error: BaseException, raised: type[BaseException]) -> None:
    place = write(tmp_path, 3)

    def fails() -> None:
        with writing(tmp_path, 4) as folder:
            (folder / "weights").write_text("half")
            raise error

    with pytest.raises(raised):
        fails()
    assert names(tmp_path) == ["checkpoint-3"]
    assert fault_of(place) is None


def test_an_error_of_the_device_is_no_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="CUDA") as caught, writing(tmp_path, 4):
        raise RuntimeError("CUDA error: device-side assert triggered")
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files there")
def test_a_file_that_may_not_grow_is_told(tmp_path: Path) -> None:
    """The system's own limit, in a child, which is then beyond its quota."""
    write(tmp_path, 3)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with writing(tmp_path, 4) as folder:
                (folder / "weights").write_bytes(b"w" * 10_000)
        except CheckpointError as error:
            (tmp_path / "told").write_text(str(error))

    assert killing.child(fill) == 0
    told = (tmp_path / "told").read_text()
    assert f"{tmp_path / 'checkpoint-4'} could not be written" in told
    assert "File too large" in told
    assert f"{tmp_path / 'checkpoint-3'} is complete" in told
    assert names(tmp_path) == ["checkpoint-3", "told"]


def test_what_a_kill_left_is_ended_or_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    os.rename(tmp_path / "checkpoint-3", tmp_path / ".checkpoint-3.part")  # killed between mark and rename
    os.rename(tmp_path / "checkpoint-2", tmp_path / ".checkpoint-2.old")  # killed while it was deleted
    (tmp_path / ".checkpoint-4.part").mkdir()  # killed while it was written
    (tmp_path / ".checkpoint-notes").mkdir()  # not ours
    recover(tmp_path)
    assert names(tmp_path) == [".checkpoint-notes", "checkpoint-1", "checkpoint-3"]
    assert fault_of(tmp_path / "checkpoint-3") is None


def test_thinning_out_keeps_the_newest_complete_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    prune(tmp_path, None)
    prune(tmp_path, 3, [tmp_path / "checkpoint-1"])
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5", "checkpoint-6"]
    (tmp_path / "checkpoint-6" / "weights").unlink()  # then 5 is the only one to go on from
    prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_a_foreign_folder_is_nobodys_to_delete(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "elsewhere").mkdir()
    real = write(tmp_path / "elsewhere", 2)
    (tmp_path / "checkpoint-2").symlink_to(real)
    write(tmp_path, 3)
    write(tmp_path, 4)
    prune(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "elsewhere"]
    assert fault_of(real) is None


def test_killed_at_any_write_a_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Kills and full disks at changes spread over a whole run: two checkpoints, the second thinning out the first, and
    the final save. Each run is resumed with ``auto`` and ends bitwise as the one that was left alone."""
    library = killing.build(tmp_path)
    if library is None:
        pytest.skip("needs Linux and a C compiler")
    found = killing.start(library, tmp_path)
    assert found["wrong"] == []
    assert found["kills"] >= 50
    assert found["changes"] > 200
    assert any("is complete" in told for told in found["told"])
    assert all("could not be written" in told and "make room" in told for told in found["told"])
