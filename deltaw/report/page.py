"""A report as one HTML file: no script, nothing fetched, light and dark, to be read, mailed or printed.

Everything given is text and is escaped; only a chart is markup, and it is refused if it could run or fetch
anything. Knows nothing of what is reported.
"""

from __future__ import annotations

import html
import os
import re
import secrets
import string
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from deltaw.errors import ConfigError

__all__ = ["Page", "render_page", "save_page"]

Tone = Literal["", "good", "bad", "warn", "soft"]

# What an SVG needs to be a picture; what scripts, fetches or embeds is not among them.
_SVG_TAGS = {
    *("svg", "g", "defs", "use", "symbol", "title", "desc", "path", "rect", "circle", "ellipse", "line"),
    *(
        "polyline",
        "polygon",
        "text",
        "tspan",
        "clipPath",
        "linearGradient",
        "radialGradient",
        "stop",
        "marker",
    ),
}
_OUTSIDE = re.compile(r"url\(\s*['\"]?(?!#)|@import|expression\(", re.IGNORECASE)


class Page:
    """A page, written from top to bottom.

    Example:
        >>> Page("Run 7").add_heading("Result").add_facts({"accuracy": "83%"}).save("report.html")

    Args:
        title: of the window and at the top.
        subtitle: one line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{_text(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="subtitle">{_text(subtitle)}</p>')

    def add_heading(self, text: str) -> Self:
        """Begins a section."""
        return self._add(f"<h2>{_text(text)}</h2>")

    def add_text(self, text: str, tone: Tone = "") -> Self:
        """A paragraph; a blank line in it begins another."""
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            self._add(f"<p{_class(tone)}>{_text(paragraph)}</p>")
        return self

    def add_facts(self, facts: Mapping[str, Any]) -> Self:
        """The few numbers that matter, large."""
        tiles = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
        return self._add(f'<dl class="facts">{"".join(tiles)}</dl>')

    def add_pairs(self, pairs: Mapping[str, Any]) -> Self:
        """Names and their values, one a line: settings, versions."""
        rows = (f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in pairs.items())
        return self._add(f'<div class="wide"><table class="pairs"><tbody>{"".join(rows)}</tbody></table></div>')

    def add_table(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[Any]],
        *,
        numbers: Collection[int] = (),
        caption: str = "",
    ) -> Self:
        """A table.

        Args:
            header: the names of the columns.
            rows: cells, as many as columns.
            numbers: the columns, from 0, that are set flush right.
            caption: below it.

        Raises:
            ConfigError: a row of another length than the header.
        """
        rows = list(rows)
        ragged = [n for n, row in enumerate(rows) if len(row) != len(header)]
        if ragged:
            raise ConfigError(f"a table of {len(header)} columns: rows {ragged[:5]} have more or fewer cells")

        def line(tag: str, cells: Sequence[Any]) -> str:
            marks = (' class="number"' if n in numbers else "" for n in range(len(cells)))
            scope = ' scope="col"' if tag == "th" else ""
            return "".join(
                f"<{tag}{scope}{mark}>{_text(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True)
            )

        said = f"<caption>{_text(caption)}</caption>" if caption else ""
        body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
        head = f"<thead><tr>{line('th', header)}</tr></thead>"
        return self._add(f'<div class="wide"><table>{said}{head}<tbody>{body}</tbody></table></div>')

    def add_svg(self, svg: str, caption: str = "") -> Self:
        """A chart.

        Raises:
            ConfigError: it is no SVG, or it could run a script or fetch something.
        """
        _check_svg(svg)
        said = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
        return self._add(f'<figure><div class="wide">{svg}</div>{said}</figure>')

    def add_code(self, code: str, *, caption: str = "", tone: Tone = "") -> Self:
        """Text set as it is, with what it is above it; ``tone`` colours its edge."""
        said = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
        return self._add(f"<figure{_class('snippet', tone)}>{said}<pre>{_text(code)}</pre></figure>")

    def add_marked(self, pieces: Iterable[tuple[str, bool, bool]], *, caption: str = "") -> Self:
        """Text set as it is, of pieces (text, whether it is marked, whether it is set apart); ``caption`` above it."""
        said = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
        text = ""
        for piece, marked, apart in pieces:
            shown = f"<b>{_text(piece)}</b>" if apart else _text(piece)
            text += f"<mark>{shown}</mark>" if marked else shown
        return self._add(f'<figure class="snippet">{said}<pre>{text}</pre></figure>')

    def add_finding(self, name: str, text: str, cure: str = "", tone: Tone = "") -> Self:
        """Something found: its name, what it is, what to do; ``tone`` colours its edge."""
        advice = f"<p{_class('soft')}>{_text(cure)}</p>" if cure else ""
        body = f"<p><strong>{_text(name)}</strong></p><p>{_text(text)}</p>{advice}"
        return self._add(f"<section{_class('snippet', tone)}>{body}</section>")

    def html(self) -> str:
        """The whole file."""
        return render_page(self.title, self._parts)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the file; see :func:`save_page`."""
        return save_page(path, self.html())

    def _add(self, part: str) -> Self:
        self._parts.append(part)
        return self


def render_page(title: str, sections: Iterable[str]) -> str:
    """The frame of every report around sections that are HTML already (a :class:`Page` writes them)."""
    frame = resources.files("deltaw.report").joinpath("page.html").read_text(encoding="utf-8")
    return string.Template(frame).substitute(title=_text(title), body="\n".join(sections))


def save_page(path: str | os.PathLike[str], page: str) -> Path:
    """Writes the whole file or none of it; folders are made as needed. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _text(value: Any) -> str:
    return html.escape(str(value))


def _class(*names: str) -> str:
    named = " ".join(name for name in names if name)
    return f' class="{named}"' if named else ""


def _check_svg(svg: str) -> None:
    if "<!" in svg:  # no entities, and no comment that HTML ends elsewhere than XML does
        raise ConfigError("adding a chart: it holds a declaration or a comment; give the <svg> element alone")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ConfigError(f"adding a chart: it is not well-formed SVG ({error})") from error
    faults = [] if _local(root.tag) == "svg" else [f"its root is <{_local(root.tag)}>, not <svg>"]
    for element in root.iter():
        tag = _local(str(element.tag))
        if tag not in _SVG_TAGS:
            faults.append(f"<{tag}> is no shape")
        for name, value in element.attrib.items():
            local = _local(name).lower()
            reaches = local in ("href", "src") and not value.startswith("#")
            if local.startswith("on") or reaches or _OUTSIDE.search(value):
                faults.append(f"{local}={value[:40]!r} on <{tag}> runs or fetches something")
    if faults:
        raise ConfigError("adding a chart:\n" + "\n".join(f"  - {fault}" for fault in faults[:10]))


def _local(name: str) -> str:
    """A name without its namespace."""
    return name.rpartition("}")[2]
