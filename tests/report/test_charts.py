"""Charts: valid SVG that shows the numbers, takes its colours from the page and reaches nothing outside."""

from __future__ import annotations

import math
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from deltaw.errors import ConfigError, MissingExtra
from deltaw.report import Bars, grouped_bars, histogram, loss_curve, smooth

LOSSES = [3.0, 2.0, math.nan, 1.5, math.inf, 1.0]
STEPS = [1, 2, 3, 4, 5, 6]


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def curve() -> str:
    return loss_curve(STEPS, LOSSES, learning_rate=[1e-3 * s for s in STEPS])


def bars() -> str:
    before = Bars("before <b>", [0.0, 0.1], [(0.0, 0.2), (0.02, 0.3)])
    after = Bars("after", [0.83, None], [(0.7, 0.9), None])
    return grouped_bars(["a & b", "new\nwords"], [before, after], marks=Bars("nearest", [0.5, 0.6]), y_label="right")


def ranges() -> str:
    return histogram([(1, 10, 3), (11, 20, 0), (21, 25, 7)], x_label="tokens <n>", y_label="examples")


@pytest.mark.parametrize("draw", [curve, bars, ranges])
def test_a_chart_is_self_contained_svg_in_the_colours_of_its_page(draw):
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["role"] == "img"
    outside = {url for url in re.findall(r"https?://[^\"'\s<]+", svg) if not url.startswith("http://www.w3.org/")}
    assert not outside
    assert "<style" not in svg  # its rules would be the whole page's
    assert not re.search(r"#0\d0\d0\d\b", svg)  # every drawn colour became a variable
    assert "var(--chart-ink, #" in svg
    ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("draw", [curve, bars, ranges])
def test_the_same_numbers_give_the_same_file(draw):
    assert draw() == draw()


def test_two_charts_on_one_page_share_no_id():
    def ids(svg):
        return set(re.findall(r'\bid="([^"]+)"', svg))

    assert ids(curve())
    assert not ids(curve()) & ids(bars())


def test_references_within_a_chart_still_lead_somewhere():
    svg = curve()
    ids = set(re.findall(r'\bid="([^"]+)"', svg))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    assert used
    assert used <= ids


def test_bars_say_their_values_labels_and_legend():
    said = texts(bars())
    for text in ("0%", "10%", "83%", "a & b", "before <b>", "after", "nearest", "right"):
        assert text in said, text


def test_a_loss_that_is_not_finite_leaves_a_gap():
    assert {"each step", "smoothed", "learning rate", "step", "loss"} <= set(texts(curve()))
    assert not re.search(r"\b(nan|inf)\b", curve().lower())


def test_one_step_is_a_curve_too():
    assert "each step" in texts(loss_curve([1], [2.5]))


def test_smooth_starts_at_the_first_value_and_passes_over_what_is_not_finite():
    assert smooth([2.0, 2.0, math.nan, 2.0]) == pytest.approx([2.0] * 4)
    assert smooth([1.0, 3.0], 0.0) == [1.0, 3.0]
    assert smooth([4.0, 0.0], 0.5)[1] == pytest.approx((0.25 * 4) / 0.75)
    assert math.isnan(smooth([math.nan])[0])
    with pytest.raises(ConfigError, match=r"1\.0"):
        smooth([1.0], 1.0)


@pytest.mark.parametrize(("steps", "losses", "rates"), [([], [], None), ([1, 2], [1.0], None), ([1], [1.0], [1, 2])])
def test_a_curve_of_unequal_lengths_is_refused(steps, losses, rates):
    with pytest.raises(ConfigError, match="as many of each"):
        loss_curve(steps, losses, learning_rate=rates)


def test_all_faults_of_bars_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        grouped_bars(["a", "b"], [Bars("short", [0.1]), Bars("percent", [83.0, 0.2])])
    assert "'short'" in str(caught.value)
    assert "83.0" in str(caught.value)
    with pytest.raises(ConfigError, match="1 to 4"):
        grouped_bars(["a"], [])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"deltaw\[report\]"):
        loss_curve([1], [1.0])


def test_a_histogram_names_its_axes_and_refuses_nothing_to_draw():
    assert {"tokens <n>", "examples"} <= set(texts(ranges()))
    with pytest.raises(ConfigError, match="histogram of nothing"):
        histogram([])
