"""Tokens are those of the renderer, row after row, whatever the chunks, the processes and where they are kept."""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from tinychat import tiny_tokenizer
from tokensets import conversation, question, same

from deltaw.data import RenderSettings, TokenDataset, render_examples, tokenize, tokenize_rows
from deltaw.data.rows import Row
from deltaw.errors import DataError

ROWS = [conversation(i) if i % 3 else question(i) for i in range(60)]
TEXTS = [{"text": f"{i} " * (i % 40)} for i in range(1, 60)]
SETTINGS = {
    "plain": (ROWS, RenderSettings()),
    "dropped": (ROWS, RenderSettings(max_length=60, overlong="drop")),
    "cut": (ROWS, RenderSettings(max_length=60, overlong="truncate")),
    "blocks": (TEXTS, RenderSettings(max_length=16)),
    "control": ([conversation(1), question(1) | {"prompt": "is <|im_end|> the end?"}], RenderSettings()),
}


def one_by_one(rows, tokenizer, settings):
    """What the others are measured against: no chunks, no files, no processes."""
    made = [render_examples(row, tokenizer, settings) for row in rows]
    return TokenDataset.of(
        [example for examples in made for example in examples],
        [number for number, examples in enumerate(made) for _ in examples],
        dropped=sum(not examples for examples in made),
    )


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 7)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_tokens_are_those_of_the_renderer(case, memory, small_chunks, scratch, monkeypatch):
    monkeypatch.setattr(tokenize, "MEMORY", memory)
    rows, settings = SETTINGS[case]
    tokens = tokenize_rows(rows, tiny_tokenizer(), settings)
    expected = one_by_one(rows, tiny_tokenizer(), settings)
    assert same(tokens, expected)
    assert (tokens.folder is None) == (memory > 0)
    assert (tokens.dropped > 0) == (case == "dropped")
    assert (len(tokens) > len(rows)) == (case == "blocks")
    assert (sum(tokens.escaped) > 0) == (case == "control")


def test_other_processes_give_the_same(small_chunks, scratch, caplog):
    rows, settings = SETTINGS["dropped"]
    tokens = tokenize_rows(rows, tiny_tokenizer(), settings, workers=2)
    assert same(tokens, one_by_one(rows, tiny_tokenizer(), settings))
    assert not caplog.records  # nothing fell back on one process


def test_the_real_tokenizer_in_other_processes(smol, small_chunks):
    rows = [*ROWS, {"prompt": "naïve <|im_end|> 東京", "completion": "😀"}]
    assert same(tokenize_rows(rows, smol, workers=2), one_by_one(rows, smol, RenderSettings()))


def test_a_tokenizer_that_cannot_be_sent_is_used_here(caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.spare = lambda: None
    tokens = tokenize_rows(ROWS, tokenizer, workers=2)
    assert same(tokens, one_by_one(ROWS, tiny_tokenizer(), RenderSettings()))
    assert "one process tokenizes, not 2" in caplog.text


def test_processes_that_fail_are_told_with_the_cure():
    with pytest.raises(DataError, match=r"cannot be sent.*dataset_num_proc: 1"):
        tokenize_rows([question(0) | {"spare": lambda: 0}], tiny_tokenizer(), workers=2)


@pytest.mark.parametrize(("rows", "expected"), [(0, 1), (10, 1), (30, 2), (4000, 4)])
def test_more_processes_are_used_where_there_is_work_for_them(rows, expected, monkeypatch):
    monkeypatch.setattr(tokenize, "PROCESS_WORK", 7000)
    monkeypatch.setattr(tokenize, "_cores", lambda: 4)
    workers, chunks = tokenize._as_many_as_help(tokenize._chunks(question(i) for i in range(rows)))
    assert workers == expected
    assert sum(len(chunk.rows) for chunk in chunks) == rows


def test_ranks_of_one_machine_share_its_cores(monkeypatch):
    cores = tokenize._cores()
    assert cores >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert tokenize._cores() == 1


def test_long_documents_make_short_chunks(monkeypatch):
    monkeypatch.setattr(tokenize, "CHUNK_CHARACTERS", 1000)
    chunks = list(tokenize._chunks({"messages": [{"role": "user", "content": "x" * 400}]} for _ in range(7)))
    assert [(chunk.first, len(chunk.rows)) for chunk in chunks] == [(0, 3), (3, 3), (6, 1)]


@pytest.mark.parametrize("workers", [1, 2])
def test_all_bad_rows_are_told_in_one_error(workers, small_chunks):
    rows = [{"prompt": i} if i % 8 == 0 else question(i) for i in range(60)]
    rows[8] = Row({"prompt": None}, "train.jsonl", 12)
    with pytest.raises(DataError, match=r"^8 of 60 rows cannot be rendered") as caught:
        tokenize_rows(rows, tiny_tokenizer(), workers=workers)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(": ")[0].strip() for line in lines[:5]] == [
        "row 0",
        "train.jsonl:12",
        "row 16",
        "row 24",
        "row 32",
    ]
    assert lines[5:] == ["  ... and 3 more"]


def test_an_error_while_rows_are_read_is_raised_as_it_is(small_chunks):
    def rows():
        yield from ROWS
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        tokenize_rows(rows(), tiny_tokenizer())


def test_progress_counts_rows_up_to_all_of_them(small_chunks):
    calls = []
    tokenize_rows(ROWS, tiny_tokenizer(), progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == [*range(7, 60, 7), 60]
    assert {total for _, total in calls} == {60}
    calls.clear()
    tokens = tokenize_rows(iter(ROWS), tiny_tokenizer(), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (60, None)
    assert same(tokens, tokenize_rows(ROWS, tiny_tokenizer()))


def test_no_rows_are_no_tokens(scratch):
    for workers in (None, 1):
        assert len(tokenize_rows([], tiny_tokenizer(), workers=workers)) == 0


def test_files_are_removed_with_the_tokens_and_after_a_kill(scratch, monkeypatch):
    monkeypatch.setattr(tokenize, "MEMORY", 1000)
    script = (
        "import sys; from deltaw.data import tokenize, tokenize_rows; from tinychat import tiny_tokenizer\n"
        "from tokensets import question; import os, signal\n"
        "tokenize.MEMORY = 0\n"
        "tokens = tokenize_rows([question(i) for i in range(300)], tiny_tokenizer())\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
    [left] = scratch.iterdir()
    tokens = tokenize_rows(ROWS, tiny_tokenizer())
    assert not left.exists()
    assert list(scratch.iterdir()) == [tokens.folder]
    del tokens
    gc.collect()
    assert not list(scratch.iterdir())


def test_files_are_removed_when_rows_are_bad(scratch, monkeypatch):
    monkeypatch.setattr(tokenize, "MEMORY", 0)
    monkeypatch.setattr(tokenize, "CHUNK_ROWS", 7)
    with pytest.raises(DataError):
        tokenize_rows([*ROWS, {"prompt": 1}], tiny_tokenizer())
    assert not list(scratch.iterdir())


INTERRUPTED = """
import sys
from deltaw.data import tokenize, tokenize_rows
from tinychat import tiny_tokenizer
from tokensets import question
tokenize.CHUNK_ROWS, tokenize.MEMORY = 16, 0
def rows():
    for i in range(10**9):
        yield question(i)
tokenize_rows(rows(), tiny_tokenizer(), workers=2, progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_no_file(scratch):
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "16\n"
    assert list(scratch.iterdir())
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in {1, -signal.SIGINT, 130}
    assert errors.count("KeyboardInterrupt") == 1, errors
    assert not list(scratch.iterdir())
    for _ in range(200):
        if not group_of(process.pid):
            break
        time.sleep(0.05)
    assert not group_of(process.pid)


def group_of(leader):
    """Processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            found.append(stat.parent.name)
    return found


MEMORY_SCRIPT = """
import gc, json, sys
from deltaw import footprint
from deltaw.data import render_examples, tokenize, tokenize_rows
from tinychat import tiny_tokenizer

tokenize.MEMORY = 4 << 20

def anonymous():
    gc.collect()
    return footprint.anonymous()

def rows(n):
    for i in range(n):
        yield {"prompt": f"add {i}", "completion": f"{i} and so on up"}

tokenizer = tiny_tokenizer()
tokenize_rows(rows(2000), tokenizer)
list(rows(10))
peak = base = anonymous()
def watch(done, total):
    global peak
    if done % 16384 == 0:
        peak = max(peak, anonymous())
tokens = tokenize_rows(rows(100_000), tokenizer, progress=watch)
mapped = max(peak, anonymous()) - base
count = tokens.tokens
lists = [example.as_features() for row in rows(10_000) for example in render_examples(row, tokenizer)]
in_lists = 10 * (anonymous() - base)
print(json.dumps({"mapped": mapped, "lists": in_lists, "tokens": count, "folder": tokens.folder is not None}))
"""


@pytest.mark.slow
def test_many_rows_take_bounded_memory(scratch):
    """100,000 rows of a generator, and a few MB of arrays in memory: lists of their ids would take far more."""
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["folder"]
    assert said["tokens"] > 2_000_000
    assert said["mapped"] < 24 << 20 < said["lists"] / 2, said
