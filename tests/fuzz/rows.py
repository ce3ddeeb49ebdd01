"""Hostile data: rows of any values in every format, and files that are hardly data."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tinychat import tiny_tokenizer

from deltaw.data import RenderSettings, load_rows, render_examples

from .harness import CONTROL, STRINGS, Tally, attempt, broken_bytes, kind, untouched, values


@cache
def tokenizer() -> Any:
    return tiny_tokenizer()


def _message(content: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    roles = st.sampled_from(["system", "user", "assistant", "tool", "human", "", None, 3])
    return st.fixed_dictionaries(
        {"role": roles, "content": content}, optional={"tool_calls": values(4), "name": STRINGS}
    )


ANY = values()
TURNS = st.lists(_message(STRINGS | ANY), max_size=4)
ROWS = st.one_of(
    st.fixed_dictionaries({"messages": TURNS | ANY}, optional={"tools": ANY}),
    st.fixed_dictionaries(
        {
            "conversations": st.lists(
                st.fixed_dictionaries({"from": STRINGS | ANY, "value": STRINGS | ANY}), max_size=4
            )
            | ANY
        }
    ),
    st.fixed_dictionaries({"prompt": STRINGS | TURNS | ANY, "completion": STRINGS | TURNS | ANY}),
    st.fixed_dictionaries(
        {"instruction": STRINGS | ANY, "output": STRINGS | ANY}, optional={"input": ANY, "system": ANY, "history": ANY}
    ),
    st.fixed_dictionaries({"text": STRINGS | ANY}, optional={"label": ANY}),
    st.fixed_dictionaries(
        {"prompt": STRINGS | TURNS, "chosen": STRINGS | TURNS | ANY, "rejected": STRINGS | TURNS | ANY}
    ),
    st.dictionaries(STRINGS, ANY, max_size=3),
    ANY,
)
SETTINGS = st.builds(
    RenderSettings,
    max_length=st.sampled_from([None, 2, 16, 200]),
    completion_only_loss=st.sampled_from([None, True, False]),
    overlong=st.sampled_from(["error", "drop", "truncate_prompt", "truncate"]),
    last_turn_only_loss=st.booleans(),
)


@kind("data rows", st.tuples(ROWS, SETTINGS), "rows of every format: wrong types, nulls, surrogates, huge strings")
def data_rows(given: tuple[Any, RenderSettings], folder: Path, tally: Tally) -> None:
    row, settings = given
    examples = attempt(tally, lambda: render_examples(row, tokenizer(), settings))
    for one in examples or []:
        assert len(one.input_ids) == len(one.labels)
        assert all(label in (-100, token) for token, label in zip(one.input_ids, one.labels, strict=True))
        assert settings.max_length is None or len(one.input_ids) <= settings.max_length


def _plain(text: str) -> str:
    """As long a text without a character that a control token has."""
    return "x" * len(text)


SAFE = st.lists(st.sampled_from([*CONTROL, "a", " ", "\n", "é"]), min_size=1, max_size=6).map("".join)


@kind("control tokens", st.lists(SAFE, min_size=2, max_size=6), "control tokens written by a user stay text")
def control_tokens(texts: list[str], folder: Path, tally: Tally) -> None:
    def turns(written: list[str]) -> dict[str, Any]:
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(written)]
        return {"messages": messages[: len(messages) // 2 * 2]}

    settings = RenderSettings(max_length=None)
    made = attempt(tally, lambda: render_examples(turns(texts), tokenizer(), settings))
    if made:
        special = set(tokenizer().all_special_ids) | {0, 1}
        (plain,) = render_examples(turns([_plain(text) for text in texts]), tokenizer(), settings)
        count = [sum(token in special for token in one.input_ids) for one in (made[0], plain)]
        assert count[0] == count[1], "a user's text became a control token"


def _good_rows() -> bytes:
    rows = [
        {"messages": [{"role": "user", "content": f"é {n}"}, {"role": "assistant", "content": "b"}]} for n in range(4)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _good_csv() -> bytes:
    return b'prompt,completion\n"a, b",c\n"d\ne",f\n'


@cache
def _good_parquet() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), stream)
    return stream.getvalue()


FILES = {".jsonl": _good_rows, ".json": lambda: json.dumps([{"text": "a"}] * 3).encode(), ".csv": _good_csv}
DAMAGED = st.one_of(
    *[st.tuples(st.just(ending), broken_bytes(good)) for ending, good in FILES.items()],
    st.tuples(st.just(".parquet"), broken_bytes(_good_parquet)),
)


@kind("data files", DAMAGED, "jsonl, json, csv and parquet files, damaged")
def data_files(given: tuple[str, bytes], folder: Path, tally: Tally) -> None:
    ending, data = given
    path = folder / f"rows{ending}"
    path.write_bytes(data)
    with untouched(folder):
        rows = attempt(tally, lambda: load_rows(str(path)))
    for row in rows or []:
        assert isinstance(row, dict)
