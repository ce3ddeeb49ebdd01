"""Floor 4: numbers drawn. Charts as SVG and whole reports as one HTML file; knows nothing of models."""

from deltaw.report.charts import Bars, grouped_bars, histogram, loss_curve, smooth
from deltaw.report.check_page import check_page
from deltaw.report.page import Page, render_page, save_page

__all__ = [
    "Bars",
    "Page",
    "check_page",
    "grouped_bars",
    "histogram",
    "loss_curve",
    "render_page",
    "save_page",
    "smooth",
]
