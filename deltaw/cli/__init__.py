"""Floor 7: the command line, one small file a verb.

Nothing heavy is imported here or at the top of a verb's file: ``deltaw --help`` must answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from deltaw.cli import chat, check, common, evaluate, generate, merge, methods, train

__all__ = ["app", "main"]

app = typer.Typer(
    name="deltaw",
    help="Fine-tune large language models with low-rank adapters.",
    epilog="A run on this machine: deltaw train --model-name-or-path smollm2-135m --dataset-name rows.jsonl",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="train", cls=train.TrainCommand)(common.guarded(train.train))
app.command(name="check", cls=train.TrainCommand)(common.guarded(check.check))
app.command(name="eval")(common.guarded(evaluate.evaluate))
app.command(name="generate")(common.guarded(generate.generate))
app.command(name="chat")(common.guarded(chat.chat))
app.command(name="merge")(common.guarded(merge.merge))
app.command(name="methods")(common.guarded(methods.methods))


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"deltaw {version('deltaw')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised; may stand anywhere.")] = False,
) -> None:
    del version
    common.DEBUG.set(debug)


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point. Exits with 0; 2 for a mistake that a message explains; 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in args:  # a person adds it at the end of the line that failed
        args = ["--debug", *(arg for arg in args if arg != "--debug")]
    app(args=args, prog_name="deltaw")
