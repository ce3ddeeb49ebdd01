"""``deltaw eval``: loss and answers of an adapter on a data set, beside those of the bare base if asked."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaw.cli.common import Adapter, AsJson, Dtype, Loaded, Model, counting, emit, load_adapted, run_of, working
from deltaw.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from deltaw.config import RunConfig
    from deltaw.data import RenderSettings

__all__ = ["evaluate"]

Row = dict[str, Any]
_METRICS = ("loss", "exact_match")


def evaluate(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Rows: a file, a folder or a hub id.")],
    adapter: Adapter = None,
    model: Model = None,
    split: Annotated[str | None, typer.Option(help="Which part of the data set.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="loss, exact_match, or file.py:function, which gets (predictions, rows) and returns a "
            "number, a dict of numbers, or one bool a row; may be given several times. Unset: loss and, "
            "where rows have answers, exact_match.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 128,
    batch_size: Annotated[int, typer.Option(help="Rows evaluated together.", min=1)] = 8,
    limit: Annotated[int | None, typer.Option(help="Evaluate this many rows, drawn once.", min=1)] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="The base without the adapter, too.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the answers here, a line each.")] = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure an adapter: loss over the supervised tokens, and greedy answers against the right ones."""
    if compare_base and adapter is None:
        raise ConfigError("--compare-base compares an adapter with its base: give --adapter")
    with working():
        from deltaw.data import load_rows

        rows: list[Row] = [*load_rows(dataset, split, limit=limit)]
        settings = _settings(None if adapter is None else run_of(adapter), rows[0])
        wanted = list(dict.fromkeys(metric or _default_metrics(rows[0], settings)))
        functions = {name: _function(name) for name in wanted if name not in _METRICS}
        references = _references(rows, settings) if "exact_match" in wanted else []
        loaded = load_adapted(model, adapter, dtype)
        sides = {"adapter" if adapter else "base": nullcontext()}
        if compare_base:
            sides = {"base": loaded.model.disable_adapter(), **sides}
        result: dict[str, Any] = {
            "model": loaded.name,
            "adapter": adapter,
            "dataset": dataset,
            "rows": len(rows),
        }
        answers: dict[str, list[str]] = {}
        for side, way in sides.items():
            with way:
                result[side], answers[side] = _measure(
                    loaded, rows, settings, references, wanted, functions, max_new_tokens, batch_size
                )
    if output is not None:
        _write(output, rows, references, answers)
        result["predictions"] = str(output)
    emit(result, as_json, lambda console: _show(console, result, list(sides)))


def _measure(
    loaded: Loaded,
    rows: list[Row],
    settings: RenderSettings,
    references: list[str],
    wanted: list[str],
    functions: dict[str, Callable[..., Any]],
    max_new_tokens: int,
    batch_size: int,
) -> tuple[dict[str, Any], list[str]]:
    from deltaw.data import render_all
    from deltaw.evaluate import Score, exact_match, generate_batch, supervised_loss

    scores: dict[str, Any] = {}
    if "loss" in wanted:
        rendered = render_all(rows, loaded.tokenizer, settings)
        with counting("loss") as progress:
            scores |= supervised_loss(loaded.model, rendered, batch_size, progress).as_dict()
    answers: list[str] = []
    if functions or "exact_match" in wanted:
        with counting("answers") as progress:
            answers = generate_batch(
                loaded.model,
                loaded.tokenizer,
                rows,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                settings=settings,
                progress=progress,
            )
    if "exact_match" in wanted:
        scores["exact_match"] = exact_match(answers, references).as_dict()
    for name, function in functions.items():
        value = function(answers, rows)
        key = name.rpartition(":")[2]
        if isinstance(value, dict):
            scores |= {f"{key}.{part}": float(number) for part, number in value.items()}
        elif isinstance(value, list | tuple):
            if len(value) != len(rows):
                raise ConfigError(f"--metric {name} returned {len(value)} verdicts for {len(rows)} rows")
            scores[key] = Score(key, sum(map(bool, value)), len(rows)).as_dict()
        else:
            scores[key] = float(value)
    return scores, answers


def _settings(run: RunConfig | None, row: Row) -> RenderSettings:
    """Rows are rendered as the run that trained the adapter did, but never cut."""
    from deltaw.data import RenderSettings
    from deltaw.data.formats import columns

    if run is None:
        return RenderSettings(max_length=None)
    named, text_field = run.dataset_format, run.dataset_text_field
    if named != "auto" and any(row.get(column) is None for column in columns(named, text_field)[0]):
        named = "auto"  # these rows are written otherwise than those of the run
    return RenderSettings.of(run, max_length=None, dataset_format=named)


def _default_metrics(row: Row, settings: RenderSettings) -> list[str]:
    from deltaw.data import detect_format

    named = settings.dataset_format
    kind = detect_format(row, settings.text_field) if named == "auto" else named
    return ["loss"] if kind == "text" else ["loss", "exact_match"]


def _references(rows: list[Row], settings: RenderSettings) -> list[str]:
    """The right answer of every row: its completion, or its last assistant turn."""
    from deltaw.data import to_example

    found: list[str] = []
    missing: list[int] = []
    for i, row in enumerate(rows):
        example = to_example(
            row,
            settings.text_field,
            dataset_format=settings.dataset_format,
            label_names=settings.label_names,
        )
        answer: Any = example.completion if example.messages is None else example.messages[-1:]
        if isinstance(answer, list):
            answer = answer[-1]["content"] if answer and answer[-1]["role"] == "assistant" else None
        if answer is None:
            missing.append(i)
        found.append(str(answer))
    if missing:
        raise ConfigError(f"exact_match needs an answer in every row; rows {missing[:5]} have none: use --metric loss")
    return found


def _function(name: str) -> Callable[..., Any]:
    """The function that ``file.py:function`` names. It is the caller's own code, and it is run."""
    file, colon, function = name.rpartition(":")
    if not colon:
        raise ConfigError(f"--metric {name}: unknown{did_you_mean(name, _METRICS)} (or name a file.py:function)")
    spec = importlib.util.spec_from_file_location("deltaw_metric", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ConfigError(f"--metric {name}: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"--metric {name}: {file} has no function {function!r}{did_you_mean(function, vars(module))}")
    return getattr(module, function)


def _write(path: Path, rows: list[Row], references: list[str], answers: dict[str, list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            line: dict[str, Any] = {"row": row}
            if references:
                line["reference"] = references[i]
            line |= {side: texts[i] for side, texts in answers.items() if texts}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def _show(console: Console, result: dict[str, Any], sides: list[str]) -> None:
    from rich.table import Table

    table = Table(title=f"{result['rows']:,} rows of {result['dataset']}", title_justify="left")
    table.add_column("")
    for side in sides:
        table.add_column(side, justify="right")
    for key in result[sides[-1]]:
        table.add_row(key, *(_cell(result[side].get(key)) for side in sides))
    console.print(table)
    if "predictions" in result:
        console.print(f"answers: {result['predictions']}", markup=False, soft_wrap=True)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        bounds = f"{100 * value['low']:.0f}-{100 * value['high']:.0f}%"
        return f"{100 * value['value']:.1f}% ({bounds})"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
