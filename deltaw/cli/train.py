"""``deltaw train``: one run from its description to a saved and verified adapter. Knows only the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from deltaw.cli.common import AsJson, emit, say, working
from deltaw.cli.options import config_options, split_overrides

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["TrainCommand", "train"]

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
    from deltaw.config import load_run_config

    config = load_run_config(run, ctx.meta.get(_OVERRIDES, {}))
    for note in config.notes:
        say().print(f"note: {note}", style="yellow", markup=False)
    from deltaw.pipeline import check_run, run_training

    out = say()

    def tell(event: str) -> None:
        if not quiet:
            out.print(event, style="dim", markup=False, soft_wrap=True)

    if dry_run:
        with working():
            report = check_run(config, on_event=tell)
        result = {"config": config.model_dump(mode="json"), "data": report}
        emit(result, as_json, lambda console: console.print(config.to_yaml(), markup=False, end=""))
        return
    try:
        with working():
            done = run_training(config, on_event=tell, quiet=quiet)
    except KeyboardInterrupt:
        if any(Path(config.output_dir).glob("checkpoint-*")):
            out.print("to go on: the same command with --resume-from-checkpoint true", style="yellow")
        raise
    emit(done.results, as_json, lambda console: _show(console, done))


def _show(console: Console, done: Any) -> None:
    results = done.results
    console.print(f"[bold green]done[/] in {results['train_runtime']:.0f} s, adapter in {done.output_dir}")
    for key, name in (("train_loss", "training loss"), ("eval_loss", "evaluation loss")):
        if key in results:
            console.print(f"  {name:16} {results[key]:.4f}")
    console.print(f"  {'speed':16} {results['train_tokens_per_second']:,.0f} tokens/s")
    console.print(f"  {'trained':16} {results['trainable_params']:,} of {results['all_params']:,} parameters")
    console.print(f"  {'reloaded':16} {done.parity}", markup=False)
    console.print(f"  talk to it: deltaw chat --adapter {done.output_dir}", markup=False, soft_wrap=True)
