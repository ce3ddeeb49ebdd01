"""``deltaw train``: one run from its description to a saved and verified adapter. Knows only the pipeline."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from deltaw.cli.common import AsJson, bar_when_counted, emit, say, working
from deltaw.cli.options import config_options, split_overrides

if TYPE_CHECKING:
    from rich.console import Console

    from deltaw.config import RunConfig

__all__ = ["TrainCommand", "described", "train"]

_OVERRIDES = "deltaw.overrides"


class TrainCommand(TyperCommand):
    """A command whose flags are a run's keys; they are made when its help or a run is asked for."""

    def get_params(self, ctx: Any) -> Any:
        own = super().get_params(ctx)
        if not hasattr(self, "_keys"):
            self._keys = config_options()
        return [*own, *self._keys]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            own = {flag for param in super().get_params(ctx) for flag in param.opts if flag.startswith("--")}
            args, ctx.meta[_OVERRIDES] = split_overrides(args, own)
        return super().parse_args(ctx, args)


def described(ctx: typer.Context, run: Path | None) -> RunConfig:
    """The run, from its file and the keys that stood on the command line; what is worth noting about it is told."""
    from deltaw.config import load_run_config

    config = load_run_config(run, ctx.meta.get(_OVERRIDES, {}))
    for note in config.notes:
        say().print(f"note: {note}", style="yellow", markup=False)
    return config


def train(
    ctx: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN.YAML]",
            help="The run's description. Every key is a flag too; --no-x switches x off.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved description and check the data; load no weights."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune: from RUN.YAML and flags to an adapter that is saved, reloaded and verified."""
    config = described(ctx, run)
    from deltaw.pipeline import check_run, run_training
    from deltaw.train.checkpoints import newest
    from deltaw.train.signals import Interrupted, Terminated

    out = say()

    def tell(event: str) -> None:
        if not quiet:
            out.print(event, style="dim", markup=False, soft_wrap=True)

    if dry_run:
        with working(), bar_when_counted("tokenizing") as count:
            report = check_run(config, on_event=tell, on_rows=None if quiet else count)
        result = {"config": config.model_dump(mode="json"), "data": report}
        emit(result, as_json, lambda console: console.print(config.to_yaml(), markup=False, end=""))
        return
    try:
        with working(), bar_when_counted("tokenizing") as count:
            done = run_training(config, on_event=tell, on_rows=None if quiet else count, quiet=quiet)
    except (Interrupted, Terminated) as stopped:
        out.print(f"stopped: {stopped}", style="yellow", markup=False, soft_wrap=True)
        _tell_how_to_go_on(out, stopped.checkpoint)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:  # before training, after it, or a second time
        _tell_how_to_go_on(out, newest(config.output_dir))
        raise
    emit(done.results, as_json, lambda console: _show(console, done))


def _tell_how_to_go_on(out: Console, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        out.print(f"to go on from {checkpoint}:", style="yellow", markup=False, soft_wrap=True)
        out.print(f"  {_going_on(sys.argv[1:])}", markup=False, soft_wrap=True)


def _going_on(words: list[str]) -> str:
    """The command that was given, made to go on where it stopped."""
    kept, words = [], list(words)
    while words:
        word = words.pop(0)
        if word.split("=")[0].replace("_", "-") != "--resume-from-checkpoint":
            kept.append(word)
        elif "=" not in word and words and not words[0].startswith("--") and not words[0].endswith((".yaml", ".yml")):
            words.pop(0)  # its value
    return shlex.join(["deltaw", *kept, "--resume_from_checkpoint", "auto"])


def _show(console: Console, done: Any) -> None:
    results = done.results
    console.print(f"[bold green]done[/] in {results['train_runtime']:.0f} s, adapter in {done.output_dir}")
    for key, name in (("train_loss", "training loss"), ("eval_loss", "evaluation loss")):
        if key in results:
            console.print(f"  {name:16} {results[key]:.4f}")
    console.print(f"  {'speed':16} {results['train_tokens_per_second']:,.0f} tokens/s")
    console.print(f"  {'trained':16} {results['trainable_params']:,} of {results['all_params']:,} parameters")
    console.print(f"  {'reloaded':16} {done.parity}", markup=False, soft_wrap=True)
    console.print(f"  talk to it: deltaw chat --adapter {done.output_dir}", markup=False, soft_wrap=True)
