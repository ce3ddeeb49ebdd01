"""What the demo prints. Given texts and results, shows them on a terminal or in a plain file.

Knows nothing of how they came about; only rich is needed here.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from deltaw.evaluate import Score
    from text_to_sql.demo_steps import Merged
    from text_to_sql.score import Outcome

__all__ = ["SPLIT_NAMES", "Example", "Show", "clock", "megabytes", "pick_examples", "printable", "rows_text"]

Row = Mapping[str, Any]
SPLIT_NAMES = {
    "seen": "known tables, known wordings",
    "wording": "known tables, new wordings",
    "table": "new tables, known wordings",
    "both": "new tables, new wordings",
}
SHOWN_ROWS = 3
SHOWN_COLUMNS = 4


class Example(NamedTuple):
    """A question and what the trained model made of it."""

    split: str
    kind: str
    question: str
    sql: str
    returned: str
    right: bool
    gold: str


class Show:
    """Prints the story in its order, one method a part."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, quiet=quiet)
        self.quiet = quiet

    def heading(self, text: str) -> None:
        """Begins a stage."""
        self.console.print(f"\n[bold cyan]{text}[/]")

    def say(self, text: str, style: str = "") -> None:
        """A line of text, without markup, wrapped at the width of the terminal and indented."""
        width = max(20, self.console.width)
        for line in text.splitlines():
            wrapped = textwrap.fill(
                line,
                width,
                initial_indent="  ",
                subsequent_indent="  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            self.console.print(Text(wrapped, style=style), soft_wrap=True)

    def copyable(self, text: str) -> None:
        """A line to copy: never broken, whatever the width."""
        self.console.print(Text(f"  {text}", style="bold"), soft_wrap=True)

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int, int], object] | None]:
        """A bar for work that is counted, where this is a terminal."""
        if self.quiet or not self.console.is_terminal:
            yield None
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def task(self, row: Row, table_rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> None:
        """What is to be learned: one question, its table and the SQL that answers it."""
        table = Table(*columns[:SHOWN_COLUMNS], box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", style="dim")
        for cells in table_rows:
            table.add_row(*(Text(str(cell)) for cell in cells[:SHOWN_COLUMNS]))
        content = Table.grid(padding=(0, 2))
        content.add_row(Text("table", style="dim"), f"{row['table']}, {len(columns)} columns")
        content.add_row("", table)
        content.add_row(Text("question", style="dim"), Text(row["prompt"][-1]["content"], style="bold"))
        content.add_row(Text("SQL", style="dim"), Text(row["sql"], style="green"))
        self.console.print(Panel(content, title="deltaw demo: text to SQL", title_align="left", padding=(1, 2)))

    def accuracies(
        self, after: Mapping[str, Score], before: Mapping[str, Score], baseline: Mapping[str, Score]
    ) -> None:
        """Before and after, split by split, beside what needs no training."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
        table.add_column("questions about")
        for name in ("no training", "before", "after", "95% interval"):
            table.add_column(name, justify="right", no_wrap=True)
        for split, score in after.items():
            low, high = score.interval
            table.add_row(
                SPLIT_NAMES[split],
                f"{baseline[split].value:.0%}",
                f"{before[split].value:.0%}",
                Text(f"{score.value:.0%}", style="bold green"),
                f"{low:.0%} to {high:.0%}",
            )
        self.console.print(Padding(table, (1, 0, 0, 2), expand=False))

    def example(self, example: Example) -> None:
        """One question, the model's SQL, and the rows it returned."""
        mark = Text("✓", style="bold green") if example.right else Text("✗", style="bold red")
        lines = [
            Text.assemble((example.question, "bold"), (f"  ({SPLIT_NAMES[example.split]})", "dim")),
            Text(example.sql, style="green" if example.right else "red"),
            Text.assemble(("→ ", "dim"), example.returned),
        ]
        if not example.right:
            lines.append(Text.assemble(("gold: ", "dim"), example.gold))
        grid = Table.grid(padding=(0, 1))
        grid.add_row(mark, Group(*lines))
        self.console.print(Padding(grid, (1, 0, 0, 2), expand=False))

    def merged(self, merged: Merged) -> None:
        """What folding the adapter into the base changed."""
        apart, together = merged.apart, merged.together
        self.say(
            f"{SPLIT_NAMES[merged.split]}: {apart.value:.1%} with the adapter beside its base, "
            f"{together.value:.1%} merged ({apart.right} and {together.right} of {together.total}; {merged.verdict})",
            "" if merged.holds else "bold red",
        )
        self.say(str(merged.drift), "dim")
        if merged.other_way:
            self.say(merged.other_way, "dim")
        if not merged.differing:
            self.say("every answer is the same, letter for letter", "dim")
        for question, a, b, status_a, status_b in merged.differing:
            self.say(f"differs: {question}", "dim")
            self.say(f"  apart   {a}  ({status_a})", "dim")
            self.say(f"  merged  {b}  ({status_b})", "dim")

    def beside(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Two runs, a line for each thing that was measured of both."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
        table.add_column("")
        for name in ("16 bits", "4 bits"):
            table.add_column(name, justify="right", no_wrap=True)
        for what, other, this in rows:
            table.add_row(what, other, Text(this, style="bold"))
        self.console.print(Padding(table, (1, 0, 0, 2), expand=False))

    def seconds(self, stages: Mapping[str, float]) -> None:
        """How long each stage took."""
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages.items())
        self.say(f"{clock(sum(stages.values()))} in all: {parts}", "dim")

    def chat(self, program: str, adapter: str, system: str, question: str) -> None:
        """The two commands that go on from here; they can be copied as they are."""
        self.say("Ask it yourself (it answers what you type; /exit leaves):")
        self.copyable(f"{program} chat --adapter {shlex.quote(adapter)} --system {shlex.quote(system)}")
        self.say(f"for example: {question}", "dim")
        self.say("One plain model, without an adapter:")
        merged = shlex.quote(f"{adapter.removesuffix('adapter')}merged")
        self.copyable(f"{program} merge --adapter {shlex.quote(adapter)} --output {merged}")


def pick_examples(questions: Mapping[str, Sequence[Row]], outcomes: Mapping[str, Sequence[Outcome]]) -> list[Example]:
    """One question a split, each of another kind, and one failure among them if there is any."""

    def shown(split: str, n: int) -> Example:
        row, found = questions[split][n], outcomes[split][n]
        returned = rows_text(found.rows, found.error)
        question, right = row["prompt"][-1]["content"], found.status == "correct"
        return Example(split, found.kind, question, printable(found.sql), printable(returned), right, found.gold)

    failing = next(  # in the hardest split that has one
        (split for split in reversed(list(outcomes)) if any(o.status != "correct" for o in outcomes[split])),
        None,
    )
    picked: list[Example] = []
    kinds: set[str] = set()
    for split, found in outcomes.items():
        # the first that is as right or wrong as it should be, and of a kind not shown yet
        best = min(
            range(len(found)),
            key=lambda n: ((found[n].status == "correct") == (split == failing), found[n].kind in kinds, n),
        )
        picked.append(shown(split, best))
        kinds.add(found[best].kind)
    return picked


def printable(text: str) -> str:
    """On one line and harmless to a terminal: what a model writes may hold any character."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def rows_text(rows: Sequence[Sequence[Any]], error: str = "") -> str:
    """A result in one line: ``3 rows: A | 1.5, B | 2, ...``."""
    if error:
        return f"did not run: {error.rpartition(': ')[2]}"
    if not rows:
        return "no rows"
    shown = [" | ".join(_cell(cell) for cell in row) for row in rows[:SHOWN_ROWS]]
    more = ", ..." if len(rows) > SHOWN_ROWS else ""
    if len(rows) == 1:
        return shown[0]
    return f"{len(rows)} rows: {', '.join(shown)}{more}"


def megabytes(size: int) -> str:
    """``19.6 MB``, in millions of bytes."""
    return f"{size / 1e6:,.1f} MB"


def clock(seconds: float) -> str:
    """``2:05``, or ``35 s`` below a minute."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
