"""Rows to tokens: rows a second with one and two processes beside TRL's, and the memory that a million rows take.

    python benchmarks/tokens.py                  # speed, beside TRL 1.16 (`datasets.map`, the same processes)
    python benchmarks/tokens.py --memory         # 1,000,000 short rows of a generator

Everybody renders the text-to-SQL rows with SmolLM2's tokenizer and template. TRL's figure is what making its trainer
takes on these rows less what it takes on two of them; ours is `tokenize_rows`, and the check that the trainer makes of
them. Nothing is cached, but for the line that says so.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from common import anonymous, in_turns, machine, own_process, table

Row = dict[str, Any]


def sql_rows(count: int) -> list[Row]:
    """Rows of the example, repeated with a number in each question, so that no two are the same."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from text_to_sql.build import build

    rows = []
    for i, row in enumerate(islice(cycle(build(train=2000)["train"]), count)):
        *first, last = row["prompt"]
        prompt = [*first, {"role": "user", "content": f"{last['content']} ({i})"}]
        rows.append({"prompt": prompt, "completion": row["completion"]})
    return rows


# --- speed --------------------------------------------------------------------------------------------------


def trl_maker(tokenizer: Any, rows: list[Row], processes: int) -> Callable[[], Any]:
    """Makes TRL's trainer on the rows, and so its tokens."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list(rows)
    tiny = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )

    def make() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(
                output_dir=folder,
                max_length=None,
                dataset_num_proc=None if processes == 1 else processes,
                report_to="none",
                use_cpu=True,
            )
            return SFTTrainer(
                LlamaForCausalLM(tiny), args, train_dataset=dataset, processing_class=tokenizer
            ).train_dataset

    return make


def speed(count: int, rounds: int) -> None:
    import logging

    import transformers

    from deltaw.data import RenderSettings, check_tokens, tokenize_rows
    from deltaw.loading import load_tokenizer

    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    tokenizer = load_tokenizer("smollm2-135m")
    rows, settings = sql_rows(count), RenderSettings(max_length=None)
    few = rows[:2]
    tokens = tokenize_rows(rows, tokenizer, settings)
    theirs = trl_maker(tokenizer, rows[:200], 1)()
    # the template leaves a line break behind the last turn, which TRL trains on and we drop
    same = sum(a["input_ids"][: len(b["input_ids"])] == b["input_ids"] for a, b in zip(theirs, tokens, strict=False))
    print(f"{machine()}\n\n{count:,} rows, {tokens.tokens / count:.0f} tokens each; {same} of 200 the same in both\n")
    with tempfile.TemporaryDirectory() as cache:
        tokenize_rows(rows, tokenizer, settings, cache=cache)
        contestants: dict[str, Callable[[], Any]] = {
            "TRL on 2 rows": trl_maker(tokenizer, few, 1),
            "TRL": trl_maker(tokenizer, rows, 1),
            "TRL, 2 processes": trl_maker(tokenizer, rows, 2),
            "deltaw": lambda: tokenize_rows(rows, tokenizer, settings, workers=1),
            "deltaw, 2 processes": lambda: tokenize_rows(rows, tokenizer, settings, workers=2),
            "deltaw, from the cache": lambda: tokenize_rows(rows, tokenizer, settings, cache=cache),
            "the check": lambda: check_tokens(tokens, tokenizer, settings, rows=rows),
        }
        seconds = {name: min(took) for name, took in in_turns(contestants, rounds, warmup=0).items()}
    empty = seconds.pop("TRL on 2 rows")
    for name in ("TRL", "TRL, 2 processes"):
        seconds[name] -= empty
    lines = [
        [name, f"{took:.1f}", f"{count / took:,.0f}", f"{seconds['TRL'] / took:.2f}"] for name, took in seconds.items()
    ]
    print(table(["", "seconds (best)", "rows/s", "TRL / it"], lines))


# --- memory -------------------------------------------------------------------------------------------------


def short_rows(count: int) -> Iterator[Row]:
    for i in range(count):
        yield {"prompt": f"Which number comes after {i}?", "completion": f"{i + 1}."}


def memory(count: int) -> None:
    """In this process: anonymous memory while the rows are tokenized, above what it was before."""
    from deltaw.data import tokenize_rows
    from deltaw.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    tokenize_rows(short_rows(2000), tokenizer, workers=1)
    base = peak = anonymous()
    last = 0

    def watch(done: int, total: int | None) -> None:
        nonlocal peak, last
        if done - last >= 10_000:
            last, peak = done, max(peak, anonymous())
            print(f"\r{done:,} rows, {(peak - base) / 2**20:.0f} MiB", end="", file=sys.stderr, flush=True)

    started = time.perf_counter()
    tokens = tokenize_rows(short_rows(count), tokenizer, progress=watch)
    took = time.perf_counter() - started
    peak = max(peak, anonymous())
    assert len(tokens) == count
    folder = tokens.folder
    disk = sum(file.stat().st_size for file in folder.iterdir()) if folder else 0
    said = {"tokens": tokens.tokens, "seconds": took, "peak": peak - base, "kept": anonymous() - base, "disk": disk}
    print(json.dumps(said))


def show_memory(count: int) -> None:
    said = own_process(__file__, "--measure", "--rows", str(count))
    mib = {name: f"{said[name] / 2**20:,.0f}" for name in ("peak", "kept", "disk")}
    lists = said["tokens"] * 36 / 2**20  # a pointer and an int object for each id, a pointer for each label
    print(f"{machine()}\n\n{count:,} rows of a generator, {said['tokens'] / count:.0f} tokens each\n")
    head = ["peak above the start, MiB", "kept at the end, MiB", "files, MiB", "lists would take, MiB", "seconds"]
    print(table(head, [[mib["peak"], mib["kept"], mib["disk"], f"{lists:,.0f}", f"{said['seconds']:.0f}"]]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        memory(given.rows)
    elif given.memory:
        show_memory(given.rows or 1_000_000)
    else:
        speed(given.rows or 20_000, given.rounds)
