"""Cached tokens are those that would be made anew; where they are not, they are made anew, and that is told."""

import copy
import dataclasses
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tinychat import TEMPLATE, tiny_tokenizer
from tokensets import conversation, question, same
from transformers import AutoTokenizer

from deltaw.data import RenderSettings, cache, tokenize, tokenize_rows
from deltaw.data.cache import TokenCache, tokens_fingerprint
from deltaw.errors import ConfigError, DataError
from deltaw.held import hold

ROWS = [question(i) for i in range(20)]
SETTINGS = RenderSettings()
WRITES = """
import os, signal, sys
from deltaw.data import tokenize, tokenize_rows
from tinychat import tiny_tokenizer
from tokensets import question
def progress(done, total):
    if len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
tokens = tokenize_rows([question(i) for i in range(20)], tiny_tokenizer(), cache=sys.argv[1], progress=progress)
print(tokens.tokens, tokens.folder)
"""


@pytest.fixture
def made(monkeypatch):
    """How many rows were rendered."""
    counted = []
    real = tokenize.render_examples
    monkeypatch.setattr(tokenize, "render_examples", lambda *given: counted.append(1) or real(*given))
    return counted


def entries(folder):
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def process(*arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", WRITES, *map(str, arguments)], env=environment, stdout=subprocess.PIPE
    )


def test_the_second_time_nothing_is_rendered(tmp_path, made, caplog):
    caplog.set_level(logging.INFO, "deltaw")
    progress = []
    first = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)
    assert (len(made), first.made) == (20, "")
    second = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path, progress=lambda *told: progress.append(told))
    assert len(made) == 20
    assert same(first, second)
    assert same(first, tokenize_rows(ROWS, tiny_tokenizer()))
    assert first.fingerprint == second.fingerprint == tokens_fingerprint(ROWS, tiny_tokenizer(), SETTINGS)
    assert second.made.startswith(time.strftime("%Y-"))
    assert f"tokens from the cache, made {second.made}" in caplog.text
    assert progress == [(20, 20)]
    assert pickle.loads(pickle.dumps(second)).made == second.made


def test_rows_of_an_iterable_are_cached_too_unless_they_can_be_read_only_once(tmp_path, made, caplog):
    class Again:
        def __iter__(self):
            return iter(ROWS)

    for _ in range(2):
        tokens = tokenize_rows(Again(), tiny_tokenizer(), cache=tmp_path)
    assert (len(made), len(tokens)) == (20, 20)
    assert not caplog.records
    assert same(tokenize_rows(iter(ROWS), tiny_tokenizer(), cache=tmp_path), tokens)
    assert len(made) == 40
    assert "read only once" in caplog.text


def changed_tokenizer(**attributes):
    tokenizer = tiny_tokenizer()
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_a_token():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["What"])
    return tokenizer


def with_other_bytes():
    tokenizer = tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    tokenizer.backend_tokenizer.__setstate__(json.dumps(backend).encode())
    return tokenizer


OTHERS = {
    "a row": lambda: ([*ROWS[:-1], question(21)], tiny_tokenizer(), SETTINGS),
    "the order of rows": lambda: (ROWS[::-1], tiny_tokenizer(), SETTINGS),
    "the order of keys": lambda: ([dict(reversed(row.items())) for row in ROWS], tiny_tokenizer(), SETTINGS),
    "fewer rows": lambda: (ROWS[:-1], tiny_tokenizer(), SETTINGS),
    "a setting": lambda: (ROWS, tiny_tokenizer(), RenderSettings(max_length=500)),
    "a template of the settings": lambda: (ROWS, tiny_tokenizer(), RenderSettings(chat_template=TEMPLATE + " ")),
    "the template": lambda: (ROWS, changed_tokenizer(chat_template=TEMPLATE + " "), SETTINGS),
    "eos": lambda: (ROWS, changed_tokenizer(eos_token="<|im_start|>"), SETTINGS),
    "control tokens": lambda: (ROWS, changed_tokenizer(split_special_tokens=True), SETTINGS),
    "a token more": lambda: (ROWS, with_a_token(), SETTINGS),
    "the vocabulary": lambda: (ROWS, with_other_bytes(), SETTINGS),
}


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_decides_the_tokens_is_in_the_name(what):
    assert tokens_fingerprint(*OTHERS[what]()) != tokens_fingerprint(ROWS, tiny_tokenizer(), SETTINGS)


def test_other_code_and_other_versions_make_other_entries(monkeypatch):
    usual = tokens_fingerprint(ROWS, tiny_tokenizer(), SETTINGS)
    for name, other in {"_code": lambda: "other", "version": lambda package: "0", "FORMAT": -1}.items():
        with monkeypatch.context() as changed:
            changed.setattr(cache, name, other)
            assert tokens_fingerprint(ROWS, tiny_tokenizer(), SETTINGS) != usual


def test_where_the_tokenizer_lies_and_how_it_was_used_do_not_matter(tmp_path):
    usual = tokens_fingerprint(ROWS, tiny_tokenizer(), SETTINGS)
    tiny_tokenizer().save_pretrained(tmp_path / "a")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert tokens_fingerprint(ROWS, again, SETTINGS) == tokens_fingerprint(ROWS, loaded, SETTINGS)
    used = tiny_tokenizer()
    used(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokens_fingerprint(ROWS, used, SETTINGS) == usual


def test_a_template_that_writes_the_date_is_new_every_day(monkeypatch):
    class Tomorrow(cache.date):
        @classmethod
        def today(cls):
            return cls(2100, 1, 1)

    dated = changed_tokenizer(chat_template="{{ strftime_now('%d') }}" + TEMPLATE)
    today = [tokens_fingerprint(ROWS, tokenizer, SETTINGS) for tokenizer in (dated, tiny_tokenizer())]
    monkeypatch.setattr(cache, "date", Tomorrow)
    assert tokens_fingerprint(ROWS, dated, SETTINGS) != today[0]
    assert tokens_fingerprint(ROWS, tiny_tokenizer(), SETTINGS) == today[1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "marker", "no marker", "no lock", "another's"])
def test_a_damaged_entry_is_told_and_made_again(damage, tmp_path, made, caplog):
    expected = tokenize_rows(ROWS, tiny_tokenizer())
    made.clear()
    name = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path).fingerprint
    [entry] = entries(tmp_path)
    file = entry / "ids.bin"
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 4)
    elif damage == "flipped":
        data = bytearray(file.read_bytes())
        data[100] ^= 4
        file.write_bytes(data)
    elif damage == "gone":
        file.unlink()
    elif damage == "marker":
        (entry / "tokens.json").write_bytes(b"\xff{")
    elif damage == "no marker":
        (entry / "tokens.json").unlink()
    elif damage == "no lock":
        (entry / "lock").unlink()
        os.utime(entry, (0, 0))
    else:
        said = json.loads((entry / "tokens.json").read_text())
        (entry / "tokens.json").write_text(json.dumps(said | {"fingerprint": "0"}))
    again = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)
    assert same(again, expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "made again" in caplog.text
    assert same(tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path), expected)
    assert len(caplog.records) == 1
    assert len(made) == 40
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_entry_that_is_damaged_while_another_uses_it_is_not_used(tmp_path, caplog):
    first = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)
    [entry] = entries(tmp_path)
    held = hold(entry)
    data = bytearray((entry / "rows.bin").read_bytes())
    data[0] ^= 1
    (entry / "rows.bin").write_bytes(data)
    again = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path)
    assert again.rows.tolist() == list(range(20))
    assert again.folder != first.folder
    held.release()


@pytest.mark.slow
def test_two_processes_at_once_and_one_that_is_killed(tmp_path):
    killed = process(tmp_path, "kill")
    assert killed.wait(120) == -signal.SIGKILL
    killed.stdout.close()
    [left] = tmp_path.iterdir()
    both = [process(tmp_path) for _ in range(2)]
    told = {one.communicate(timeout=120)[0] for one in both}
    assert [one.returncode for one in both] == [0, 0]
    assert len(told) == 1  # the same tokens in the same folder
    assert not left.exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_the_entry_of_a_faster_process_is_taken(tmp_path, monkeypatch):
    slow, fast = TokenCache(tmp_path), TokenCache(tmp_path)
    monkeypatch.setattr(slow, "get", lambda name: None)  # it looks before the other has finished
    quick = tokenize_rows(ROWS, tiny_tokenizer(), cache=fast)
    monkeypatch.undo()
    with tokenize.TokenWriter(slow.new_folder, 0) as writer:
        writer.add(quick)
        late = slow.keep(writer.finish(quick.fingerprint))
    assert late.folder == quick.folder
    assert late.made == ""
    assert len(list(tmp_path.iterdir())) == 1


def test_the_oldest_go_beyond_the_limit_but_none_in_use(tmp_path):
    sets = [[question(i + 100 * k) for i in range(20)] for k in range(5)]
    kept = {}
    for number, rows in enumerate(sets[:4]):
        tokens = tokenize_rows(rows, tiny_tokenizer(), cache=tmp_path)
        kept[number] = tokens.folder
        os.utime(tokens.folder / "tokens.json", (number + 1, number + 1))
        size = sum(file.stat().st_size for file in tokens.folder.iterdir())
    del tokens
    used = tokenize_rows(sets[1], tiny_tokenizer(), cache=tmp_path)
    os.utime(used.folder / "tokens.json", (2, 2))
    tokenize_rows(sets[0], tiny_tokenizer(), cache=tmp_path)  # used now, so it is the youngest
    last = tokenize_rows(sets[4], tiny_tokenizer(), cache=TokenCache(tmp_path, limit=3.5 * size))
    assert set(entries(tmp_path)) == {kept[0], kept[1], last.folder}
    TokenCache(tmp_path, limit=0).trim()
    assert set(entries(tmp_path)) == {kept[1], last.folder}  # they are open here
    del used, last
    TokenCache(tmp_path, limit=0).trim()
    assert not entries(tmp_path)


def test_where_it_is_and_how_large_it_may_be(monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAW_HOME", str(tmp_path))
    assert TokenCache().folder == tmp_path / "tokens"
    assert TokenCache().limit == 10e9
    monkeypatch.setenv("DELTAW_TOKENS_LIMIT", "0.5")
    assert TokenCache().limit == 5e8
    assert tokenize_rows(ROWS, tiny_tokenizer(), cache=True).folder.parent == tmp_path / "tokens"
    for bad in ("many", "-1", "nan"):
        monkeypatch.setenv("DELTAW_TOKENS_LIMIT", bad)
        with pytest.raises(ConfigError, match=f"DELTAW_TOKENS_LIMIT = '{bad}'"):
            TokenCache()


def test_off_is_off(monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAW_HOME", str(tmp_path))
    for value in (False, None):
        assert tokenize_rows(ROWS, tiny_tokenizer(), cache=value).folder is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_used_is_told_and_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tokens = tokenize_rows(ROWS, tiny_tokenizer(), cache=tmp_path / "file")
    assert tokens.folder is None
    assert "no tokens are cached" in caplog.text


def test_bad_rows_leave_no_entry(tmp_path):
    with pytest.raises(DataError):
        tokenize_rows([*ROWS, {"prompt": 1}], tiny_tokenizer(), cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_odd_rows_have_names_of_their_own():
    odd = [
        {"x": 1},
        {"x": "1"},
        {"x": 1.0},
        {"x": True},
        {"x": b"1"},
        {"x": "\ud800"},
        {"x": None},
        {1: 2, "x": 3},
        {"x": {2}},
    ]
    names = {tokens_fingerprint([row], tiny_tokenizer(), SETTINGS) for row in odd}
    assert len(names) == len(odd)
    loop = {"x": []}
    loop["x"].append(loop)
    assert tokens_fingerprint([loop], tiny_tokenizer(), SETTINGS) not in names


def test_a_conversation_is_cached_like_a_question(tmp_path):
    rows = [conversation(i) for i in range(9)]
    first, second = (tokenize_rows(copy.deepcopy(rows), tiny_tokenizer(), cache=tmp_path) for _ in range(2))
    assert same(first, second)
    assert second.made
    assert same(dataclasses.replace(second, made=""), tokenize_rows(rows, tiny_tokenizer()))
