"""Writes docs/check.md: what `deltaw check` finds, and what TRL does with the same data.

    python docs/pains_table.py            # writes the file; takes a minute or two

Nothing about TRL is declared: each data set of tests/pains.py is handed to its SFTTrainer, as a user would do it, on a
random model of two layers; what it raises, warns of, and puts into its batches is what the table says.
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from pains import ELSEWHERE, PAINS, PLAIN, VOCABULARY, Example, Pain, found
from tinychat import tiny_model

from deltaw.findings import FINDINGS

__all__ = ["FILE", "findings_table", "main"]

FILE = Path(__file__).with_name("check.md")
_MOST = 110  # characters of a message


@dataclass
class Outcome:
    """What a trainer did with a data set.

    Attributes:
        kind: ``caught`` (refused before training), ``fails`` (in training), ``warned``, ``silent``, or ``right`` (what
            would hurt is not in its batches).
        message: its own words, shortened.
    """

    kind: str
    message: str = ""
    heard: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"**{self.kind}**" + (f": {self.message}" if self.message else "")


class _Ear(logging.Handler):
    """Remembers what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def _listening() -> Iterator[list[str]]:
    """All warnings, issued or logged."""
    ear = _Ear()
    names = ("trl", "transformers", "accelerate", "datasets", "")
    for name in names:
        logging.getLogger(name).addHandler(ear)
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        try:
            yield ear.heard
        finally:
            for name in names:
                logging.getLogger(name).removeHandler(ear)
            ear.heard += [str(warning.message) for warning in issued]


def trl(pain: Pain) -> Outcome:
    """What TRL's SFTTrainer does with the data set."""
    import torch
    from datasets import Dataset
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = tiny_model(), pain.tokenizer(pain.template)
        model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        training = {
            "per_device_train_batch_size": pain.training.get("batch_size", 4),
            "num_train_epochs": pain.training.get("num_train_epochs", 1.0),
        }
        heard: list[str] = []
        examples: list[Example] = []
        try:
            with _listening() as heard:
                args = SFTConfig(
                    f"{folder}/out",
                    report_to="none",
                    use_cpu=True,
                    bf16=False,
                    logging_steps=1,
                    save_strategy="no",
                    disable_tqdm=True,
                    eval_strategy="no" if pain.eval_rows is None else "epoch",
                    **training,
                    **pain.settings,
                )
                trainer = SFTTrainer(
                    model=folder,
                    args=args,
                    train_dataset=Dataset.from_list(pain.rows),
                    eval_dataset=None if pain.eval_rows is None else Dataset.from_list(pain.eval_rows),
                )
        except Exception as error:  # whatever it is, it is the answer
            return Outcome("caught", _short(f"{type(error).__name__}: {error}"))
        try:
            for batch in trainer.get_train_dataloader():
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
                examples += [
                    (ids[kept].tolist(), labels[kept].tolist())
                    for ids, labels, kept in zip(batch["input_ids"], batch["labels"], mask, strict=True)
                ]
            with _listening() as more, redirect_stdout(io.StringIO()):
                trainer.train()
        except Exception as error:
            return Outcome("fails", _short(f"{type(error).__name__}: {error}"))
        hurts = pain.harm(examples, tokenizer)
        heard = [*heard, *more]
    new = [text for text in dict.fromkeys(heard) if text not in _usual()]
    gone = len(pain.rows) - len(examples)
    kind, message = ("warned", _short(new[0])) if new else ("silent", "")
    if not hurts:
        kind, message = "right", f"leaves out {gone} of {len(pain.rows)} rows" if gone else ""
    return Outcome(kind, message, set(heard))


_USUAL: set[str] | None = None


def _usual() -> set[str]:
    """What TRL says of a data set that has nothing wrong."""
    global _USUAL
    if _USUAL is None:
        _USUAL = set()  # while it is being found out
        _USUAL = trl(Pain("good", "nothing", "", PLAIN)).heard
    return _USUAL


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _MOST else text[:_MOST].rstrip() + " ..."


def _ours(pain: Pain) -> str:
    if not pain.finding:
        return "**right**"
    level = found(pain)[pain.finding]
    if pain.finding == "refused":
        return "**error**: refused while it is rendered"
    return f"**{level}**: `{pain.finding}`"


def findings_table() -> str:
    """Every finding, in Markdown."""
    lines = ["| finding | as a rule | what it means | the cure |", "| --- | --- | --- | --- |"]
    for name, kind in FINDINGS.items():
        lines.append(f"| `{name}` | {kind.level} | {kind.what} | {kind.cure or '-'} |".replace("{{", "{ {"))
    return "\n".join(lines)


def _compared(pains: list[Pain], *, numbered: bool) -> tuple[str, dict[str, int]]:
    head = ["pain"] if numbered else []
    head += ["the data", "deltaw check", "TRL"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    kinds: dict[str, int] = {}
    for pain in pains:
        outcome = trl(pain)
        kinds[outcome.kind] = kinds.get(outcome.kind, 0) + 1
        cells = [str(pain.number)] if numbered else []
        lines.append("| " + " | ".join([*cells, pain.says, _ours(pain), str(outcome)]) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines), kinds


def page() -> str:
    """The whole file."""
    import trl as peer

    _usual()
    of_the_twenty, first = _compared([pain for pain in PAINS if pain.number], numbered=True)
    beyond, second = _compared([pain for pain in PAINS if not pain.number], numbered=False)
    kinds = {
        kind: first.get(kind, 0) + second.get(kind, 0) for kind in ("caught", "fails", "warned", "silent", "right")
    }
    elsewhere = "\n".join(f"| {number} | {what} | {where} |" for number, (what, where) in sorted(ELSEWHERE.items()))
    return f"""# Checking data

Written by `python docs/pains_table.py`; do not edit.

    deltaw check run.yaml                      # exit code 1 if a run would stop
    deltaw check run.yaml --html check.html    # the same as a page
    deltaw check run.yaml --json
    deltaw train run.yaml --allow duplicates   # go on although the check found that

`deltaw check` takes what `deltaw train` takes: a run's description, and any key of it as a flag. It reads and renders
the rows as training does, and looks at every token, before any weight is loaded. It shows examples with what is learned
of them marked, counts, a histogram of the lengths, and the places that each way to make batches leaves empty.
`deltaw train` does the same first, and stops at an error. An error that is meant is allowed by its name:
`allow: [name]` in the file, or `--allow name`. In Python:

```python
from deltaw.data import RenderSettings, check_tokens, tokenize_rows

settings = RenderSettings(max_length=1024)
tokens = tokenize_rows(rows, tokenizer, settings)
report = check_tokens(tokens, tokenizer, settings, rows=rows)
report.raise_if_bad(allow=["duplicates"])
```

## What it finds

An error stops a run, a warning is shown, a note explains what is done. A finding may be milder or worse than its rule:
a few repeated rows are a note, one evaluation row in a thousand that is also trained on is a warning.

{findings_table()}

Rows that cannot be understood or rendered at all (an unknown format, a null answer, a template that rewrites earlier
turns) are one error that lists them; it cannot be allowed.

## The twenty pains, as far as data can cause them

Each data set is in `tests/pains.py`. The last column is what TRL {peer.__version__} did with the same rows, called as
a user would (`SFTTrainer(model, args=SFTConfig(...), train_dataset=Dataset.from_list(rows))`, all else by default) on a
random model of {VOCABULARY} tokens: **caught** (raised before training), **fails** (raised in training), **warned**,
**silent** (trained, and what hurts was in its batches), **right** (trained, and what hurts was not in its batches).
Where deltaw is **right**, there is nothing to find.

{of_the_twenty}

The others are met elsewhere:

| pain | what it is | where |
| --- | --- | --- |
{elsewhere}

## Beyond the twenty

{beyond}

Of all {len(PAINS)} data sets TRL {", ".join(f"{_VERBS[kind]} {count}" for kind, count in kinds.items() if count)}.
"""


_VERBS = {
    "caught": "caught",
    "fails": "failed in training on",
    "warned": "warned of",
    "silent": "trained silently on",
    "right": "did right by",
}


def main() -> None:
    FILE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
