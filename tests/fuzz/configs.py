"""Hostile descriptions of a run: bytes that are hardly YAML, and mappings of any values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from deltaw.config import RunConfig, load_run_config

from .harness import STRINGS, Tally, attempt, broken_bytes, kind, untouched, values

GOOD: dict[str, Any] = {
    "model_name_or_path": "smollm2-135m",
    "dataset_name": "rows.jsonl",
    "r": 8,
    "learning_rate": 1e-4,
    "target_modules": ["q_proj", "v_proj"],
    "max_length": 256,
    "val_size": 0.1,
    "eval_strategy": "epoch",
    "output_dir": "out",
}
KEYS = sorted(RunConfig.model_fields)


def good_yaml() -> bytes:
    return yaml.safe_dump(GOOD, sort_keys=False).encode()


def load(path: Path, overrides: Mapping[str, Any], tally: Tally) -> None:
    """Reads the run, and where it is one, writes it out and reads it again."""
    with untouched(path.parent):
        config = attempt(tally, lambda: load_run_config(path, overrides))
    if config is not None:
        again = path.with_name("again.yaml")
        again.write_text(config.to_yaml(), encoding="utf-8", errors="surrogatepass")
        assert load_run_config(again) == config, "the resolved file says another run"


@kind("config bytes", broken_bytes(good_yaml), "a run's YAML file, damaged")
def config_bytes(data: bytes, folder: Path, tally: Tally) -> None:
    path = folder / "run.yaml"
    path.write_bytes(data)
    load(path, {}, tally)


YAML_TRICKS = st.sampled_from(
    [
        "a: &a [*a]",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "!!python/object/apply:os.system ['touch pwned']",
        "r: !!python/name:os.system",
        "<<: {r: 4}\nr: 8",
        "? [a, b]\n: c",
        "r: 08\nlearning_rate: 1e-4\nbf16: yes",
        "2020-01-01: x",
        "--- {}\n--- {}",
        "[" * 5000,
        "r: " + "9" * 6000,
        "{" * 3000,
        "r: 0x" + "f" * 400,
        "\ufeffr: 4",
        "r: .nan\nlora_alpha: -.inf",
        "{r: 1, r: 2}",
        "null",
        "- a",
        "% tag",
        "r: 2001-12-14t21:59:43.10-05:00",
    ]
)


@kind("config text", YAML_TRICKS | st.text(max_size=60), "YAML's odd corners: tags, anchors, depth, huge numbers")
def config_text(text: str, folder: Path, tally: Tally) -> None:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    load(path, {"model_name_or_path": "m", "dataset_name": "d"}, tally)
    assert not Path("pwned").exists()


@kind(
    "config values",
    st.dictionaries(st.sampled_from(KEYS) | STRINGS, values(), min_size=1, max_size=5),
    "every key with values of every type, on the command line's way in",
)
def config_values(changes: dict[str, Any], folder: Path, tally: Tally) -> None:
    path = folder / "run.yaml"
    path.write_bytes(good_yaml())
    load(path, changes, tally)
