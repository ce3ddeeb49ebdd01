"""Results in order, errors as they were raised, and no process left behind."""

import builtins
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from deltaw.workers import WorkersFailed, WorkersUnfit, map_in_processes

PID = "__import__('os').getpid()"
SCRIPT = """
import functools, sys, time
from deltaw.workers import map_in_processes
print("once", flush=True)
for result in map_in_processes(eval, ["__import__('os').getpid()"] * 2 + ["__import__('time').sleep(0.05)"] * 2000, 2):
    if result:
        print(result, flush=True)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds=10):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_results_keep_the_order_of_the_items():
    items = [f"(__import__('time').sleep({0.02 * (i % 3 == 0)}), {i}, {PID})" for i in range(30)]
    results = list(map_in_processes(eval, items, 2))
    assert [i for _, i, _ in results] == list(range(30))
    assert len({pid for _, _, pid in results}) == 2
    assert gone({pid for _, _, pid in results})


def test_only_a_few_items_are_taken_ahead():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield str(i)

    with closing(map_in_processes(int, items(), 2)) as results:
        assert next(results) == 0
        assert len(taken) <= 6


def test_what_the_work_prints_is_not_taken_for_a_result():
    assert list(map_in_processes(print, ["a", "b"], 1)) == [None, None]


def test_an_error_is_raised_as_it_was_with_where_it_came_from():
    results = map_in_processes(int, ["1", "x", "2"], 2)
    assert next(results) == 1
    with pytest.raises(ValueError, match="invalid literal") as caught:
        list(results)
    assert "in another process" in caught.value.__notes__[0]


def test_work_that_cannot_be_sent_is_refused_before_any_item_is_taken():
    items = iter([1])
    with pytest.raises(WorkersUnfit, match="cannot be sent"):
        list(map_in_processes(lambda item: item, items, 2))
    assert next(items) == 1


def test_work_that_cannot_be_taken_up_is_refused_before_any_item_is_taken(monkeypatch):
    def only_here(item):
        return item

    only_here.__qualname__ = only_here.__name__ = "only_here"
    only_here.__module__ = "builtins"
    monkeypatch.setattr(builtins, "only_here", only_here, raising=False)
    items = iter([1])
    with pytest.raises(WorkersUnfit, match=r"cannot take it up.*only_here"):
        list(map_in_processes(only_here, items, 2))
    assert next(items) == 1


def test_items_that_cannot_be_sent_are_named():
    with pytest.raises(WorkersFailed, match="cannot be sent"):
        list(map_in_processes(repr, [lambda: 0], 1))


@pytest.mark.parametrize(
    ("end", "said"), [("_exit(3)", "exit code 3"), ("kill(0, 0) or __import__('os').abort()", "signal 6")]
)
def test_a_process_that_dies_is_told(end, said):
    with pytest.raises(WorkersFailed, match=f"{said}.*memory"):
        list(map_in_processes(eval, ["1", f"__import__('os').{end}", "2"], 2))


def test_an_error_while_items_are_made_is_raised_as_it_is():
    def items():
        yield from ["1"] * 9
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(map_in_processes(int, items(), 2))


def test_no_process_stays_when_nobody_wants_the_rest():
    results = map_in_processes(eval, [PID] * 4 + ["__import__('time').sleep(60)"] * 9, 2)
    pids = {next(results), next(results), next(results), next(results)}
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 10
    assert gone(pids)


def test_no_thread_stays_either():
    before = threading.active_count()
    assert list(map_in_processes(int, ["1"] * 5, 2)) == [1] * 5
    assert threading.active_count() == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path, how):
    """Ctrl-C goes to the whole group, as from a terminal; the others to the parent alone. The script has no guard."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )
    assert process.stdout.readline() == "once\n"
    pids = [int(process.stdout.readline()) for _ in range(2)]
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    out, errors = process.communicate(timeout=30)
    assert "once" not in out
    assert process.returncode == -how or how == signal.SIGINT
    assert errors.count("KeyboardInterrupt") == (how == signal.SIGINT), errors  # the parent's alone
    assert gone(pids)
