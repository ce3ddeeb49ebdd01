"""Charts as SVG text: a loss curve, grouped bars with intervals, a histogram. Given numbers, draws them.

Colours are CSS variables with fallbacks and texts are real text, so that one chart reads well on a light and
on a dark page, and also alone. Knows nothing of models, pages or files. matplotlib is needed only here.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deltaw.errors import ConfigError, MissingExtra

__all__ = ["Bars", "grouped_bars", "histogram", "loss_curve", "smooth"]

# matplotlib knows fixed colours only: each is drawn in a colour of its own and then becomes a CSS variable,
# which a page sets for each theme. name -> (drawn, where no page sets it)
_PAINTS = {
    "ink": ("#010101", "#444444"),
    "grid": ("#020202", "#d8d8d8"),
    "faint": ("#030303", "#8a8a8a"),
    "first": ("#040404", "#a3adb8"),
    "second": ("#050505", "#2563eb"),
    "third": ("#060606", "#0d9488"),
    "fourth": ("#070707", "#9333ea"),
    "mark": ("#080808", "#d97706"),
}
_SERIES = ("first", "second", "third", "fourth")
_SIZE = (6.6, 3.2)  # inches, of 72 units


@dataclass(frozen=True)
class Bars:
    """One series: a bar in each group.

    Attributes:
        name: in the legend.
        values: shares from 0 to 1, one a group; None draws nothing there.
        intervals: (low, high) of each value, drawn as a whisker; None for none.
    """

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] | None = None


def smooth(values: Sequence[float], weight: float = 0.75) -> list[float]:
    """The exponential moving average, corrected for its start; values that are not finite are passed over.

    Args:
        values: one a step.
        weight: share that the past keeps at each step, 0 (no smoothing) to below 1.

    Raises:
        ConfigError: ``weight`` is out of range.
    """
    if not 0 <= weight < 1:
        raise ConfigError(f"smoothing with weight {weight}: choose one from 0 to below 1")
    total = norm = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        out.append(total / norm if norm else math.nan)
    return out


def loss_curve(
    steps: Sequence[float],
    losses: Sequence[float],
    *,
    learning_rate: Sequence[float] | None = None,
    evaluations: Sequence[tuple[float, float]] = (),
    weight: float = 0.75,
    title: str = "Training loss by step",
) -> str:
    """The loss at each step, raw and smoothed; the learning rate faintly on a second axis where it is given.

    Args:
        steps, losses, learning_rate: of one length; losses that are not finite leave a gap.
        evaluations: (step, loss) on held-out examples, drawn as marks.
        weight: of :func:`smooth`.
        title: read out in place of the picture; it is not drawn.

    Raises:
        ConfigError: nothing to draw, or lengths that differ.
        MissingExtra: matplotlib is not installed.
    """
    with _figure() as (figure, paint):
        _draw_loss(figure, paint, steps, losses, learning_rate, evaluations, weight)
        return _svg(figure, title)


def loss_picture(
    steps: Sequence[float],
    losses: Sequence[float],
    *,
    learning_rate: Sequence[float] | None = None,
    evaluations: Sequence[tuple[float, float]] = (),
    weight: float = 0.75,
) -> bytes:
    """As :func:`loss_curve`, as a PNG on white: for pages that show no SVG, such as model cards on a hub."""
    with _figure(alone=True) as (figure, paint):
        _draw_loss(figure, paint, steps, losses, learning_rate, evaluations, weight)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def grouped_bars(
    labels: Sequence[str],
    series: Sequence[Bars],
    *,
    marks: Bars | None = None,
    y_label: str = "",
    title: str = "Scores by group",
) -> str:
    """Bars side by side in each group, in percent, with their intervals; ``marks`` as a line across a group.

    Args:
        labels: of the groups; a line break in one is kept.
        series: at most four.
        marks: what the bars are held against, such as a baseline.
        y_label: of the axis.
        title: read out in place of the picture; it is not drawn.

    Raises:
        ConfigError: nothing to draw, too many series, a series of another length or values outside 0 to 1.
        MissingExtra: matplotlib is not installed.
    """
    _check_bars(labels, series, marks)
    with _figure() as (figure, paint):
        axes = figure.add_subplot()
        width = 0.72 / len(series)
        for n, bars in enumerate(series):
            offset = (n - (len(series) - 1) / 2) * width
            color = paint[_SERIES[n]]
            shown = [(g, v) for g, v in enumerate(bars.values) if v is not None]
            at = [g + offset for g, _ in shown]
            axes.bar(at, [v for _, v in shown], width * 0.92, color=color, label=bars.name)
            for x, (group, value) in zip(at, shown, strict=True):
                low, high = (bars.intervals[group] if bars.intervals else None) or (value, value)
                if high > low:
                    axes.plot([x, x], [low, high], color=paint["ink"], linewidth=1.0)
                axes.text(x, max(high, value) + 0.015, f"{value:.0%}", ha="center", va="bottom", color=paint["ink"])
        if marks is not None:
            for group, value in enumerate(marks.values):
                if value is not None:
                    axes.plot(
                        [group - 0.42, group + 0.42],
                        [value, value],
                        color=paint["mark"],
                        linewidth=1.8,
                        linestyle=(0, (3, 1.5)),
                        label=marks.name if not group else None,
                    )
        axes.set_xticks(range(len(labels)), list(labels))
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_ylim(0, 1.1)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100%"])
        axes.set_ylabel(y_label)
        axes.tick_params(axis="x", length=0)
        _bare(axes, paint)
        _legend(axes, *axes.get_legend_handles_labels())
        return _svg(figure, title)


def histogram(
    ranges: Sequence[tuple[int, int, int]], *, x_label: str = "", y_label: str = "", title: str = "How many of each"
) -> str:
    """How many there are in each range.

    Args:
        ranges: (first, last, how many), from left to right, of one width.
        x_label, y_label: of the axes.
        title: read out in place of the picture; it is not drawn.

    Raises:
        ConfigError: nothing to draw.
        MissingExtra: matplotlib is not installed.
    """
    if not ranges:
        raise ConfigError("drawing a histogram of nothing: give at least one range")
    with _figure() as (figure, paint):
        axes = figure.add_subplot()
        width = ranges[0][1] - ranges[0][0] + 1
        lefts, counts = [low for low, _, _ in ranges], [count for _, _, count in ranges]
        axes.bar(lefts, counts, width * 0.92, align="edge", color=paint["second"])
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(x=0.02)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        _bare(axes, paint)
        return _svg(figure, title)


# --- the small steps ----------------------------------------------------------------------------------------


def _draw_loss(
    figure: Any,
    paint: dict[str, str],
    steps: Sequence[float],
    losses: Sequence[float],
    learning_rate: Sequence[float] | None,
    evaluations: Sequence[tuple[float, float]],
    weight: float,
) -> None:
    given = {"steps": steps, "losses": losses, "learning_rate": learning_rate}
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(lengths.values())) != 1 or not losses:
        raise ConfigError(f"drawing a loss curve of {lengths}: give as many of each, and at least one")
    axes = figure.add_subplot()
    raw = [value if math.isfinite(value) else math.nan for value in losses]
    dots = "." if len(raw) < 3 else None
    axes.plot(steps, raw, color=paint["first"], linewidth=1.0, marker=dots, label="each step")
    axes.plot(steps, smooth(raw, weight), color=paint["second"], linewidth=2.0, label="smoothed")
    if seen := [(step, loss) for step, loss in evaluations if math.isfinite(loss)]:
        axes.plot(
            *zip(*seen, strict=True), color=paint["mark"], linewidth=1.2, marker="o", markersize=4, label="held out"
        )
    axes.set(xlabel="step", ylabel="loss")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes.get_legend_handles_labels()
    if learning_rate is not None:
        right = axes.twinx()
        (line,) = right.plot(steps, learning_rate, color=paint["faint"], linewidth=1.0, linestyle=(0, (4, 3)))
        right.set_ylabel("learning rate", color=paint["faint"])
        right.set_ylim(bottom=0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        right.tick_params(colors=paint["faint"])
        _bare(right, paint, sides=())
        handles, labels = [*handles, line], [*labels, "learning rate"]
    _bare(axes, paint)
    _legend(axes, handles, labels)


def _check_bars(labels: Sequence[str], series: Sequence[Bars], marks: Bars | None) -> None:
    faults = []
    if not labels or not 1 <= len(series) <= len(_SERIES):
        faults.append(f"{len(labels)} groups of {len(series)} series: give at least one group and 1 to 4 series")
    for bars in [*series, *([marks] if marks else [])]:
        if len(bars.values) != len(labels) or len(bars.intervals or labels) != len(labels):
            faults.append(f"{bars.name!r} has not one value for each of the {len(labels)} groups")
        outside = [v for v in bars.values if v is not None and not 0 <= v <= 1]
        if outside:
            faults.append(f"{bars.name!r} holds {outside[0]}: give shares from 0 to 1")
    if faults:
        raise ConfigError("drawing bars:\n" + "\n".join(f"  - {fault}" for fault in faults))


@contextmanager
def _figure(*, alone: bool = False) -> Any:
    """A figure without any global state but the settings of this one drawing, and its paints by name; ``alone``: those
    of a picture that stands on no page of ours."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "report", "drawing a chart") from None
    paint = {name: fallback if alone else drawn for name, (drawn, fallback) in _PAINTS.items()}
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: it can be searched, and it takes the page's font
        "svg.hashsalt": "deltaw",  # the same numbers give the same file
        "font.size": 9,
        "text.color": paint["ink"],
        "axes.labelcolor": paint["ink"],
        "axes.edgecolor": paint["grid"],
        "axes.facecolor": "none",
        "xtick.color": paint["ink"],
        "ytick.color": paint["ink"],
    }
    with matplotlib.rc_context(settings):
        yield Figure(figsize=_SIZE, layout="constrained"), paint


def _bare(axes: Any, paint: dict[str, str], sides: Sequence[str] = ("bottom",)) -> None:
    """No box around the data; faint lines across where the axis has its own side."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in sides)
    axes.tick_params(axis="y", length=0)
    if sides:
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=paint["grid"], linewidth=0.8)


def _legend(axes: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Above the data, where it hides nothing."""
    axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(labels), frameon=False)


def _svg(figure: Any, title: str) -> str:
    """The figure as SVG that can stand inside HTML: nothing that reaches outside, and no id used twice."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # its style rule is for every element: inside a page that would be the page's elements too
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>c{own}-", text)
    for name, (drawn, fallback) in _PAINTS.items():
        text = text.replace(drawn, f"var(--chart-{name}, {fallback})")
    said = html.escape(title)
    head = f'<svg role="img" aria-label="{said}" style="stroke-linejoin: round; stroke-linecap: butt"'
    return text.replace("<svg", head, 1).replace(">", f"><title>{said}</title>", 1).strip()
