"""Charts of the evaluation report as inline SVG: the same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from infra.svg import BLUE, GREEN, GREY, ORANGE, style, svg

COLOURS: Final = {"retriever": BLUE, "item_knn": ORANGE, "popularity": GREY}


def metric_bars(methods: Mapping[str, Mapping[str, float]], kinds: Mapping[str, Sequence[str]]) -> Markup:
    """Grouped bars with standard errors, one panel for each kind of metric.

    Args:
        methods: method -> metric -> figure.
        kinds: title of a panel -> the metrics it shows.
    """
    with style():
        figure = Figure(figsize=(9.2, 3.1), layout="constrained")
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, (title, metrics) in zip(panels, kinds.items(), strict=True):
            width = 0.8 / len(methods)
            for index, (method, figures) in enumerate(methods.items()):
                places = np.arange(len(metrics)) + (index - (len(methods) - 1) / 2) * width
                heights = [figures.get(metric, 0.0) for metric in metrics]
                errors = [figures.get(f"{metric}_se", 0.0) for metric in metrics]
                colour = COLOURS.get(method, GREEN)
                axes.bar(places, heights, width * 0.92, yerr=errors, color=colour, ecolor="#6b7384", label=method.replace("_", " "))
            axes.set_xticks(np.arange(len(metrics)), metrics)
            axes.set_title(title, loc="left", fontweight="bold")
            axes.grid(visible=False, axis="x")
        panels[0].legend(loc="upper left")
        return svg(figure, "metrics")


def loss_lines(curve: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Markup:
    """The losses over the steps, those that the curve knows."""
    with style():
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        axes = figure.subplots()
        shown = [name for name in names if any(name in point for point in curve)]
        for name in shown:
            points = [(point["step"], point[name]) for point in curve if name in point]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=2.2 if name == "loss" else 1.3)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.legend(ncols=len(shown) or 1)
        return svg(figure, "loss")


def step_bars(seconds: Mapping[str, float]) -> Markup:
    """Horizontal bars of the seconds that each step took."""
    with style():
        figure = Figure(figsize=(9.2, 0.6 + 0.32 * len(seconds)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh(list(seconds), list(seconds.values()), color=BLUE, height=0.6)
        axes.bar_label(bars, fmt="{:.1f} s", padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("seconds")
        return svg(figure, "steps")
