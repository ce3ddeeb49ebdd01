"""Pages: everything escaped, nothing fetched or run, and written whole or not at all."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser

import pytest

from deltaw.errors import ConfigError
from deltaw.report import Bars, Page, grouped_bars, loss_curve, render_page, save_page

EVIL = "<script>alert('x')</script> & \"$body\""
SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{}</svg>'


class Tags(HTMLParser):
    """The tags of a page, whether they close, and what they link to."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def full_page(text: str = "text") -> Page:
    return (
        Page(text, text)
        .add_heading(text)
        .add_text(f"{text}\n\nsecond", "soft")
        .add_facts({text: text})
        .add_pairs({text: text, "r": 16})
        .add_table([text, "n"], [[text, 1], ["b", 2.5]], numbers=(1,), caption=text)
        .add_svg(loss_curve([1, 2], [2.0, 1.0], title=text), text)
        .add_svg(grouped_bars([text], [Bars(text, [0.5])], title=text))
        .add_code(text, caption=text, tone="bad")
    )


def test_a_page_is_well_formed_and_reaches_nothing_outside():
    page = full_page().html()
    tags = Tags(page)
    assert not tags.open
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(tags.seen)
    assert all(link.startswith("#") for link in tags.links)
    urls = set(re.findall(r"https?://[^\"'\s<]+", page))
    assert urls <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page  # and the browser holds it to that


def test_everything_given_is_escaped():
    page = full_page(EVIL).html()
    assert "<script" not in page
    assert Tags(page).seen.count("script") == 0
    assert "&lt;script&gt;" in page
    assert "$body" in page  # the template's own mark, in a text, is only text


def test_a_page_reads_in_light_dark_and_print():
    page = full_page().html()
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    used = set(re.findall(r"var\((--[\w-]+)", page))
    for theme in re.findall(r":root \{(.*?)\}", page, re.DOTALL):
        assert used <= set(re.findall(r"(--[\w-]+):", theme)), "a theme leaves a colour unset"


@pytest.mark.parametrize(
    "inside",
    [
        "<script>1</script>",
        "<foreignObject/>",
        '<path onload="x()"/>',
        '<use xlink:href="https://example.org/a.svg#b"/>',
        '<path style="fill: url(https://example.org/a)"/>',
        "<image/>",
        "<!-- --><g/>",
    ],
)
def test_a_picture_that_runs_or_fetches_is_refused(inside):
    with pytest.raises(ConfigError, match="adding a chart"):
        Page("t").add_svg(SVG.format(inside))


@pytest.mark.parametrize("svg", ["", "<svg>", "<p>text</p>", '<!DOCTYPE svg [<!ENTITY a "b">]><svg/>'])
def test_what_is_no_svg_is_refused(svg):
    with pytest.raises(ConfigError, match="adding a chart"):
        Page("t").add_svg(svg)


def test_a_ragged_table_is_refused():
    with pytest.raises(ConfigError, match=r"rows \[1\]"):
        Page("t").add_table(["a", "b"], [[1, 2], [3]])


def test_save_makes_folders_and_replaces_whole(tmp_path):
    path = tmp_path / "new" / "report.html"
    assert Page("older words").save(path) == path
    save_page(path, render_page("second", ["<p>ü</p>"]))
    text = path.read_text(encoding="utf-8")
    assert "second" in text
    assert "older words" not in text
    assert "ü" in text
    assert os.listdir(path.parent) == ["report.html"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = save_page(tmp_path / "report.html", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_page(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]
