"""Hostile input by way of the command line: one message and exit status 2, no traceback, no file touched."""

from __future__ import annotations

import contextlib
import io
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tinychat import save_tiny, write_rows

import deltaw
from deltaw.cli import main
from deltaw.loading import load_model

from .adapters import CONFIG, WEIGHTS
from .configs import YAML_TRICKS, good_yaml
from .harness import Tally, broken_bytes, kind, untouched
from .rows import DAMAGED


def run(arguments: list[str], tally: Tally) -> None:
    """The command in this process; whatever leaves it but SystemExit would have been a traceback."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as leaving:
            status = leaving.code
    text = out.getvalue() + err.getvalue()
    assert "Traceback" not in text, text
    assert status in (0, None, 1, 2), f"exit status {status}: {text}"
    if status in (1, 2):
        assert text.strip(), f"exit status {status} without a word"
    tally.count("taken" if status in (0, None) else f"exit {status}")


@cache
def base() -> Path:
    """A tiny chat model with a sound adapter and sound rows beside it; made once a process."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="deltaw-fuzz-"))
    save_tiny(folder / "base")
    write_rows(folder / "rows.jsonl")
    model = deltaw.get_peft_model(
        load_model(str(folder / "base")),
        deltaw.LoraConfig(
            r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(folder / "base")
        ),
    )
    model.save_pretrained(folder / "adapter")
    return folder


@kind(
    "command: run file",
    broken_bytes(good_yaml) | YAML_TRICKS.map(str.encode),
    "deltaw train --dry-run on a damaged run",
)
def run_file(data: bytes, folder: Path, tally: Tally) -> None:
    (folder / "run.yaml").write_bytes(data)
    arguments = ["train", str(folder / "run.yaml"), "--dry-run", "--quiet"]
    more = ["--model-name-or-path", str(base() / "base"), "--output-dir", str(folder / "out"), "--no-dataset-cache"]
    with untouched(folder):
        run([*arguments, *more, "--dataset-name", str(base() / "rows.jsonl"), "--dataset-num-proc", "1"], tally)


@kind("command: data", DAMAGED, "deltaw train --dry-run on damaged data")
def data(given: tuple[str, bytes], folder: Path, tally: Tally) -> None:
    ending, content = given
    (folder / f"rows{ending}").write_bytes(content)
    arguments = ["train", "--dry-run", "--quiet", "--model-name-or-path", str(base() / "base")]
    arguments += ["--dataset-name", str(folder / f"rows{ending}"), "--output-dir", str(folder / "out")]
    with untouched(folder):
        run([*arguments, "--no-dataset-cache", "--dataset-num-proc", "1"], tally)


@kind(
    "command: adapter",
    st.tuples(st.sampled_from([CONFIG, WEIGHTS]), broken_bytes(lambda: b"")),
    "deltaw generate with a damaged adapter",
)
def adapter(given: tuple[str, bytes], folder: Path, tally: Tally) -> None:
    name, noise = given
    own = folder / "adapter"
    own.mkdir()
    for file in (base() / "adapter").iterdir():
        content = file.read_bytes()
        (own / file.name).write_bytes(content[: len(content) // 2] + noise if file.name == name else content)
    arguments = ["generate", "--adapter", str(own), "--model", str(base() / "base"), "--max-new-tokens", "1"]
    with untouched(folder):
        run([*arguments, "hello"], tally)
