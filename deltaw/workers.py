"""Work spread over processes, its results in order. Knows nothing of what the work is.

A worker is a fresh interpreter that talks through pipes. It is not forked (unsafe once torch or a tokenizer has started
threads), and unlike a spawned process of `multiprocessing` it does not run the caller's script again, so that a script
without an ``if __name__ == "__main__"`` guard may use it. It ignores Ctrl-C and ends when its pipe is closed: when its
parent is gone, however that ended, no worker stays behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.spawn import get_executable
from queue import SimpleQueue
from typing import Any, BinaryIO

__all__ = ["WorkersFailed", "WorkersUnfit", "map_in_processes", "serve"]

# Ctrl-C reaches all processes, and the parent decides what follows. What the work prints must not end up among the
# results, so standard output is put aside. Both before anything is imported.
_BOOT = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
results = os.dup(1)
os.dup2(2, 1)
sys.path[:] = json.loads(sys.argv[1])
from deltaw.workers import serve
serve(0, results)
"""
_AHEAD = 2  # items that wait for each worker


class WorkersUnfit(Exception):
    """The work cannot be done in another process: it cannot be pickled, or not be read back there."""


class WorkersFailed(Exception):
    """A process ended by itself, or an item cannot be sent to it."""


def map_in_processes(
    work: Callable[[Any], Any], items: Iterable[Any], count: int, environment: dict[str, str] | None = None
) -> Iterator[Any]:
    """``map(work, items)`` by ``count`` processes, in order, at most a few items ahead.

    Args:
        work: picklable, as are the items and the results.
        environment: variables of the processes, besides those of this one.

    Raises:
        WorkersUnfit: before the first result.
        WorkersFailed: a process ended by itself, or an item cannot be pickled.
        Exception: whatever ``work`` raises, with the other process's traceback as a note.
    """
    try:
        pickled = pickle.dumps(work, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickle raises what the object's own methods raise
        raise WorkersUnfit(f"it cannot be sent to another process: {error}") from error
    workers: list[_Worker] = []
    waiting: deque[Future[Any]] = deque()
    threads = ThreadPoolExecutor(count, thread_name_prefix="deltaw-worker")
    try:
        for _ in range(count):
            workers.append(_Worker(pickled, environment or {}))
        for ready in [threads.submit(worker.receive) for worker in workers]:
            try:
                ready.result()
            except Exception as error:
                raise WorkersUnfit(f"another process cannot take it up: {error}") from error
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in workers:
            idle.put(worker)

        def ask(item: Any) -> Any:
            worker = idle.get()
            try:
                return worker.ask(item)
            finally:
                idle.put(worker)

        for item in items:
            waiting.append(threads.submit(ask, item))
            if len(waiting) > _AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        for worker in workers:
            worker.close()
    finally:
        for worker in workers:
            worker.kill()  # nothing is left to do, or nothing is wanted any more; a thread that waits for it wakes up
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.forget()


class _Worker:
    """One process, seen from its parent."""

    def __init__(self, work: bytes, environment: dict[str, str]) -> None:
        path = json.dumps([str(entry) for entry in sys.path])
        executable = get_executable()
        self._process = subprocess.Popen(
            [executable.decode() if isinstance(executable, bytes) else str(executable), "-c", _BOOT, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._work: bytes | None = work

    def receive(self) -> Any:
        try:
            if self._work is not None:  # by the thread that waits for the answer: a large one fills the pipe
                self._to.write(self._work)
                self._to.flush()
                self._work = None
            good, answer = pickle.load(self._from)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.kill()
            code = self._process.wait()
            ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise WorkersFailed(f"a process {ended}, perhaps because memory ran out") from error
        if good:
            return answer
        raise answer

    def ask(self, item: Any) -> Any:
        try:
            pickled = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)  # whole, or not at all
        except Exception as error:
            raise WorkersFailed(f"what is to be done cannot be sent to another process: {error}") from error
        with contextlib.suppress(OSError):  # a process that is gone is found by receive
            self._to.write(pickled)
            self._to.flush()
        return self.receive()

    def close(self) -> None:
        """Lets the process end by itself."""
        with contextlib.suppress(OSError):
            self._to.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def kill(self) -> None:
        self._process.kill()

    def forget(self) -> None:
        self._process.wait()
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):
                pipe.close()


def serve(source: int, target: int) -> None:
    """The other end: takes up the work, then does it for each item until there are no more.

    Args:
        source, target: file descriptors to read pickles from and to write them to.
    """
    with os.fdopen(source, "rb") as items, os.fdopen(target, "wb") as results:
        try:
            work = pickle.load(items)
        except Exception as error:
            _send(results, False, error)
            return
        _send(results, True, None)
        while True:
            try:
                item = pickle.load(items)
            except EOFError:
                return
            try:
                answer = work(item)
            except Exception as error:
                _send(results, False, error)
            else:
                _send(results, True, answer)


def _send(results: BinaryIO, good: bool, answer: Any) -> None:
    if not good:
        answer = _portable(answer)
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, and the next read will say so
        pickle.dump((good, answer), results, pickle.HIGHEST_PROTOCOL)
        results.flush()


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note; as a RuntimeError, if it cannot be pickled and read back."""
    note = "in another process:\n" + "".join(traceback.format_exception(error))
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:
        copied = RuntimeError(f"{type(error).__name__}: {error}")
    copied.add_note(note)
    return copied
