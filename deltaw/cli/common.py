"""What every verb shares: errors as short messages, results for people or for machines, loading an adapter.

Knows nothing of any one verb.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from deltaw.errors import ConfigError, DeltawError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from deltaw.config import RunConfig

__all__ = [
    "DEBUG",
    "AsJson",
    "Loaded",
    "bar_when_counted",
    "counting",
    "emit",
    "guarded",
    "load_adapted",
    "run_of",
    "say",
    "working",
]

DEBUG: ContextVar[bool] = ContextVar("debug", default=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else, on stdout.")]
Adapter = Annotated[str | None, typer.Option("--adapter", "-a", help="Folder of the adapter.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Base model; unset: the one that the adapter names.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]


def guarded(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb, with mistakes told in a few red words (exit 2) and Ctrl-C obeyed quietly (exit 130)."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except DeltawError as error:
            if DEBUG.get():
                raise
            say().print(f"[bold red]error:[/] {_plain(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            if DEBUG.get():
                raise
            say().print("[yellow]stopped[/]")
            raise typer.Exit(130) from None

    return run


def say() -> Console:
    """Where messages for people go: standard error, so that standard output holds results alone."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def emit(result: dict[str, Any], as_json: bool, human: Callable[[Console], object]) -> None:
    """The result: one JSON object, or whatever ``human`` draws; on standard output either way."""
    if as_json:
        print(json.dumps(_finite(result), indent=2, ensure_ascii=False, default=str))
        return
    from rich.console import Console

    human(Console(highlight=False))


@contextmanager
def working() -> Iterator[None]:
    """While work is done, what libraries print goes to standard error, and their chatter stays away."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], object]]:
    """A bar on standard error for work that is counted, where that is a terminal; else nothing."""
    from rich.progress import Progress

    with Progress(console=say(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def bar_when_counted(what: str) -> Iterator[Callable[[int, int | None], object]]:
    """A bar like `counting`'s that is there only from each first count to the last one, for work among other work."""
    from rich.progress import Progress

    shown: list[Progress] = []

    def count(done: int, total: int | None) -> None:
        if not shown and done != total:
            bar = Progress(console=say(), transient=True, disable=not sys.stderr.isatty())
            bar.start()
            bar.add_task(what, total=total)
            shown.append(bar)
        for bar in shown:
            bar.update(bar.task_ids[0], completed=done, total=total)
        if done == total:
            _stop(shown)

    try:
        yield count
    finally:
        _stop(shown)


def _stop(bars: list[Any]) -> None:
    while bars:
        bars.pop().stop()


class Loaded(NamedTuple):
    """A model ready to answer, its tokenizer, its name, and the run that trained its adapter (if it says)."""

    model: Any
    tokenizer: Any
    name: str
    run: RunConfig | None


def load_adapted(
    model: str | None, adapter: str | None, dtype: str = "auto", *, load_in_4bit: bool | None = None
) -> Loaded:
    """The base with the adapter on it; the tokenizer, and so the chat template, is the adapter's own.

    Args:
        load_in_4bit: the base's weights; None: as the run had them that trained the adapter.

    Raises:
        ConfigError: neither is given, or the adapter's folder holds none.
        DeltawError: whatever loading finds wrong.
    """
    if model is None and adapter is None:
        raise ConfigError("nothing to load: give --adapter FOLDER, or --model NAME for a base alone")
    run = None if adapter is None else run_of(adapter)
    from deltaw.loading import load_model, load_tokenizer

    if adapter is None:
        assert model is not None
        return Loaded(_placed(load_model(model, dtype=dtype)), load_tokenizer(model), model, run)
    from deltaw.model import PeftConfig, PeftModel

    name = model or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not name:
        raise ConfigError(f"{adapter} does not name its base model: give it with --model")
    own = (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(adapter if own else name)
    if _template_changed(adapter, tokenizer):
        say().print(
            f"warning: {adapter} was trained with another chat template than the one that is there now, so the model "
            "sees other tokens than it learned from; put its chat_template.jinja back",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    base = load_model(name, dtype=dtype, quantization_config=_quantization(run, load_in_4bit))
    adapted = PeftModel.from_pretrained(base, adapter)
    return Loaded(_placed(adapted), tokenizer, name, run)


def run_of(adapter: str) -> RunConfig | None:
    """The run that trained an adapter, if its folder says.

    Raises:
        ConfigError: the folder holds no adapter, or a broken ``run.yaml``.
    """
    _require_adapter(adapter)
    file = Path(adapter) / "run.yaml"
    if not file.is_file():
        return None
    from deltaw.config import load_run_config

    return load_run_config(file)


def _template_changed(adapter: str, tokenizer: Any) -> bool:
    """Whether the run that trained the adapter recorded another template than the tokenizer has now."""
    from deltaw.provenance import text_fingerprint

    try:
        said = json.loads((Path(adapter) / "all_results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    recorded = said.get("template_fingerprint") if isinstance(said, dict) else None
    return recorded is not None and recorded != text_fingerprint(tokenizer.chat_template)


def _quantization(run: RunConfig | None, load_in_4bit: bool | None) -> Any:
    """How the run that trained the adapter kept the base's weights, and so what the adapter has learned to correct."""
    kept = None if run is None else run.quantization
    if load_in_4bit is False or (kept is None and not load_in_4bit):
        return None
    from deltaw.quant.config import NF4Config

    return NF4Config(**kept or {"bnb_4bit_use_double_quant": True})


def _placed(model: Any) -> Any:
    """On the GPU where there is one, and ready to answer."""
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _require_adapter(adapter: str) -> None:
    folder = Path(adapter)
    if (folder / "adapter_config.json").is_file():
        return
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise ConfigError(f"--adapter {adapter}: no such folder{did_you_mean(folder.name, siblings)}")
    inside = sorted(p.parent.name for p in folder.glob("*/adapter_config.json"))
    cure = f"; did you mean {os.path.join(adapter, inside[-1])}?" if inside else ""
    raise ConfigError(f"--adapter {adapter}: it has no adapter_config.json{cure}")


def _plain(text: str) -> str:
    """Square brackets as themselves, not as markup."""
    from rich.markup import escape

    return escape(text)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
