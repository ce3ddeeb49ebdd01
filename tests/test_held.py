"""A folder stays while a process that holds it lives, and not longer than someone looks for it after that."""

import os
import signal
import subprocess
import sys
import time

import pytest

from deltaw import held
from deltaw.held import hold, new_folder, remove_unheld

HOLDS = """
import sys, time
from pathlib import Path
from deltaw.held import new_folder
held = new_folder(Path(sys.argv[1]), "held-")
print(held.folder, flush=True)
time.sleep(60)
"""
FORKS = """
import os, sys
from pathlib import Path
from deltaw.held import new_folder
held = new_folder(Path(sys.argv[1]), "held-")
if os.fork() == 0:
    del held
    sys.exit()
os.wait()
assert held.folder.is_dir(), "the child took it away"
print(held.folder)
"""


def test_a_folder_goes_with_its_hold(tmp_path):
    kept = new_folder(tmp_path / "a" / "b", "x-")
    assert kept.folder.is_dir()
    kept.release()
    kept.release()
    assert not kept.folder.exists()


def test_only_what_nobody_holds_is_removed(tmp_path):
    mine = new_folder(tmp_path, "x-")
    other = hold(mine.folder)
    assert not remove_unheld(mine.folder)
    other.release()
    assert not remove_unheld(mine.folder)
    folder = mine.folder
    (folder / "more").mkdir()
    assert folder.rename(tmp_path / "kept")
    mine.release()  # it removes what it made, which is elsewhere now
    assert remove_unheld(tmp_path / "kept")
    assert remove_unheld(tmp_path / "kept")
    assert not list(tmp_path.iterdir())
    assert hold(tmp_path / "kept") is None


def test_a_folder_that_was_never_held_is_left_alone_while_it_is_young(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    assert not remove_unheld(folder)
    an_hour_ago = time.time() - 3600
    os.utime(folder, (an_hour_ago, an_hour_ago))
    assert remove_unheld(folder)


def test_without_locks_age_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(held, "fcntl", None)
    kept = new_folder(tmp_path, "x-")
    assert not remove_unheld(kept.folder)
    days_ago = time.time() - 2 * 24 * 3600
    os.utime(kept.folder, (days_ago, days_ago))
    assert remove_unheld(kept.folder)


def test_what_a_killed_process_held_can_be_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        folder = type(tmp_path)(process.stdout.readline().strip())
        assert not remove_unheld(folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert folder.is_dir()
    assert remove_unheld(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_takes_nothing_away(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORKS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not os.path.exists(done.stdout.strip())  # gone with the parent
