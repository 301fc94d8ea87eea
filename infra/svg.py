"""Figures as inline SVG in the look of the reports: the same numbers give the same bytes."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from typing import Final

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, RED = "#2f5fd0", "#e08a2e", "#5b9e6f", "#9aa3b2", "#c0504d"
_INK, _GRID = "#3a4252", "#e3e7ee"
_STYLE: Final = {
    "svg.fonttype": "none",  # real text: selectable, and small
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#c4cad6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "text.parse_math": False,
}


def style() -> AbstractContextManager[None]:
    """The look: draw a figure and call `svg` on it inside this context."""
    context: AbstractContextManager[None] = mpl.rc_context(_STYLE)
    return context


def svg(figure: Figure, salt: str) -> Markup:
    """The figure as an <svg> element.

    Args:
        figure: what was drawn.
        salt: one a chart; ids of charts on one page differ by it, and do not from run to run.

    Returns:
        the element without a prologue, metadata or a date; matplotlib escapes the labels.
    """
    sink = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        FigureCanvasSVG(figure).print_svg(sink, metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # figure_1, axes_1, ...: every chart has them
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return Markup(text)  # noqa: S704 - matplotlib escapes the labels
