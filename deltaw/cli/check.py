"""``deltaw check``: what is wrong with the data of a run, in seconds and before any weight. Knows no single finding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaw.cli.common import AsJson, bar_when_counted, emit, working
from deltaw.cli.train import described
from deltaw.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["check"]

_SHOWN = 4  # examples in the terminal
_ON_PAGE = 24
_MOST = 600  # characters of a piece in the terminal
_BARS = 8
_WIDTH = 32
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
#: (learned, control token) -> how it looks
_PAINT = {
    (False, False): "dim",
    (False, True): "cyan",
    (True, False): "bold green",
    (True, True): "bold green underline",
}
# what a terminal would obey, as pictures of it
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def check(
    ctx: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN.YAML]", help="The run's description. Every key is a flag too, as in train."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the whole report as one HTML page, too.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show the findings alone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a run's data before training: what is learned, what is wrong, the cures. Exits with 1 if it stops."""
    config = described(ctx, run)
    from deltaw.data.check_preview import pick, pieces
    from deltaw.rundata import read_data

    try:
        with working(), bar_when_counted("tokenizing") as count:
            data = read_data(config, lambda event: None, count)
    except DataError as error:  # rows that cannot even be rendered: the same verdict, and all of them in one error
        said = str(error)
        emit({"ok": False, "error": said}, as_json, lambda console: _refused(console, said))
        raise typer.Exit(1) from None
    report = data.report
    bad = report.bad(config.allow)
    chosen = pick(data.dataset, report.findings, _ON_PAGE if html else _SHOWN)
    examples = [
        {
            "row": _place(data, i),
            "tokens": int(data.dataset.lengths[i]),
            "learned": int(data.dataset.arrays(i)[1].sum()),
            "pieces": pieces(data.dataset.rendered(i), data.tokenizer, _MOST),
        }
        for i in chosen
    ]
    if html is not None:
        from deltaw.report.check_page import check_page

        check_page(report, examples, str(run or config.dataset_name), bad).save(html)
    result = {"ok": not bad, "stops": [finding.name for finding in bad], "data": report.to_dict(), "examples": examples}

    def show(console: Console) -> None:
        if not quiet:
            _show_counts(console, report)
            _show_examples(console, examples[:_SHOWN])
        _show_findings(console, report, config.allow)
        _show_verdict(console, bad, run)
        if html is not None:
            console.print(f"the whole report: {html}", markup=False, soft_wrap=True)

    emit(result, as_json, show)
    if bad:
        raise typer.Exit(1)


def _place(data: Any, index: int) -> str:
    """Where an example came from."""
    from deltaw.data.rows import where

    number = int(data.dataset.rows[index])
    known = isinstance(data.rows, Sequence) and number < len(data.rows)
    return where(data.rows[number] if known else None, number)


def _refused(console: Console, error: str) -> None:
    from rich.text import Text

    console.print(Text.assemble(("error ", _STYLES["error"]), error.translate(_CONTROLS)), soft_wrap=True)


def _show_counts(console: Console, report: Any) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    evaluated = f", {report.eval_examples:,} more to evaluate on" if report.eval_examples else ""
    share = report.supervised_tokens / report.tokens if report.tokens else 0.0
    table.add_row("examples", f"{report.examples:,}{evaluated}")
    table.add_row("tokens", f"{report.tokens:,}, of which {report.supervised_tokens:,} are learned ({share:.0%})")
    table.add_row(
        "length",
        f"{report.length_min} to {report.length_max} tokens, median {report.length_median}, "
        f"95% up to {report.length_p95}",
    )
    for line, bar in enumerate(_bars(report.histogram)):
        table.add_row("" if line else "how many", bar)
    if report.truncated or report.dropped:
        table.add_row(
            "too long",
            f"{report.truncated:,} cut, {report.truncated_supervised:,} of them lose learned text; "
            f"{report.dropped:,} rows left out",
        )
    waste = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in report.waste.items())
    if waste:
        table.add_row("empty places", f"{waste} (batches of {report.batch_size})")
    if report.steps:
        table.add_row("steps", f"{report.steps:,}")
    console.print(table)


def _bars(histogram: list[tuple[int, int, int]]) -> list[str]:
    """The histogram in a few lines of text."""
    each = -(-len(histogram) // _BARS)
    merged = [histogram[i : i + each] for i in range(0, len(histogram), each)] if each else []
    ranges = [(part[0][0], part[-1][1], sum(count for _, _, count in part)) for part in merged]
    most = max((count for _, _, count in ranges), default=0)
    wide = len(str(ranges[-1][1])) if ranges else 0
    lines = []
    for low, high, count in ranges:
        eighths = round(count / most * _WIDTH * 8)
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        lines.append(f"{low:>{wide}} to {high:>{wide}} {bar or ('▏' if count else '')} {count:,}")
    return lines


def _show_examples(console: Console, examples: list[dict[str, Any]]) -> None:
    from rich.text import Text

    colored = console.is_terminal and console.color_system is not None
    learned = Text("what is learned", "bold green") if colored else Text("[[what is learned]]")
    for example in examples:
        console.print()
        head = Text(f"{example['row']}, {example['tokens']:,} tokens, {example['learned']:,} of them learned ", "dim")
        console.print(head + Text("(") + learned + Text(")"), soft_wrap=True)
        console.print(_masked(example["pieces"], colored), soft_wrap=True)


def _masked(pieces: list[Any], colored: bool) -> Text:
    from rich.text import Text

    text, inside = Text(), False
    for piece in pieces:
        if not colored and piece.learned != inside:
            text.append("[[" if piece.learned else "]]")
        inside = piece.learned
        text.append(piece.text.translate(_CONTROLS), _PAINT[piece.learned, piece.control])
    return text if colored or not inside else text.append("]]")


def _show_findings(console: Console, report: Any, allow: list[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    if report.findings:
        console.print()
    for finding in report.findings:
        allowed = finding.level == "error" and finding.name in allow
        level, style = ("allowed", "dim") if allowed else (finding.level, _STYLES[finding.level])
        head = Text.assemble((f"{level:8}", style), (finding.name, "bold"))
        if finding.where != "train":
            head.append(f"  {finding.where}", "dim")
        console.print(head)
        body = Text(finding.message.translate(_CONTROLS))
        if finding.shown_rows:
            body.append(f"  ({finding.shown_rows})", "dim")
        if finding.cure:
            body.append(f"\ncure: {finding.cure}", "green")
        console.print(Padding(body, (0, 0, 0, 8)))


def _show_verdict(console: Console, bad: list[Any], run: Path | None) -> None:
    console.print()
    if not bad:
        console.print(f"[bold green]good[/]: nothing stops this run{f' (deltaw train {run})' if run else ''}")
        return
    names = " ".join(f"--allow {name}" for name in dict.fromkeys(finding.name for finding in bad))
    errors = "1 error stops" if len(bad) == 1 else f"{len(bad)} errors stop"
    console.print(f"[bold red]{errors} this run[/]; if it is meant: {names}", soft_wrap=True)
