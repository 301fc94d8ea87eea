"""Charts of the evaluation report as inline SVG: the same numbers give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS: Final = {"retriever": "#2f5fd0", "item_knn": "#e08a2e", "popularity": "#9aa3b2"}
_OTHER_COLOUR: Final = "#5b9e6f"
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


def metric_bars(methods: Mapping[str, Mapping[str, float]], kinds: Mapping[str, Sequence[str]]) -> Markup:
    """Grouped bars with standard errors, one panel for each kind of metric.

    Args:
        methods: method -> metric -> figure.
        kinds: title of a panel -> the metrics it shows.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 3.1), layout="constrained")
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, (title, metrics) in zip(panels, kinds.items(), strict=True):
            width = 0.8 / len(methods)
            for index, (method, figures) in enumerate(methods.items()):
                places = np.arange(len(metrics)) + (index - (len(methods) - 1) / 2) * width
                heights = [figures.get(metric, 0.0) for metric in metrics]
                errors = [figures.get(f"{metric}_se", 0.0) for metric in metrics]
                colour = COLOURS.get(method, _OTHER_COLOUR)
                axes.bar(places, heights, width * 0.92, yerr=errors, color=colour, ecolor="#6b7384", label=method.replace("_", " "))
            axes.set_xticks(np.arange(len(metrics)), metrics)
            axes.set_title(title, loc="left", fontweight="bold")
            axes.grid(visible=False, axis="x")
        panels[0].legend(loc="upper left")
        return _svg(figure, "metrics")


def loss_lines(curve: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Markup:
    """The losses over the steps, those that the curve knows."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        axes = figure.subplots()
        shown = [name for name in names if any(name in point for point in curve)]
        for name in shown:
            points = [(point["step"], point[name]) for point in curve if name in point]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=2.2 if name == "loss" else 1.3)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.legend(ncols=len(shown) or 1)
        return _svg(figure, "loss")


def codeword_usage(counts: Sequence[Sequence[int]]) -> Markup:
    """Items a codeword, the fullest first, one panel a level; the dashed line is an even spread."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 2.3), layout="constrained")
        for level, (axes, values) in enumerate(zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True)):
            heights = np.sort(np.asarray(values))[::-1]
            axes.fill_between(np.arange(len(heights)), heights, step="mid", color=COLOURS["retriever"], alpha=0.75, linewidth=0)
            axes.axhline(float(heights.mean()), color="#c0504d", linestyle="--", linewidth=1)
            axes.set_title(f"Level {level + 1}", loc="left", fontweight="bold")
            axes.set_xlabel("codeword, by rank")
            axes.set_ylim(bottom=0)
        return _svg(figure, "codewords")


def step_bars(seconds: Mapping[str, float]) -> Markup:
    """Horizontal bars of the seconds that each step took."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 0.6 + 0.32 * len(seconds)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(list(seconds), list(seconds.values()), color=COLOURS["retriever"], height=0.6)
        axes.bar_label(bars, fmt="{:.1f} s", padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds")
        return _svg(figure, "steps")


def _svg(figure: Figure, salt: str) -> Markup:
    """The figure as an <svg> element; ids differ from chart to chart and not from run to run."""
    sink = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        FigureCanvasSVG(figure).print_svg(sink, metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # figure_1, axes_1, ...: every chart has them
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return Markup(text)  # noqa: S704 - matplotlib escapes the labels
