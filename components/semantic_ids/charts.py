"""Charts of a SID table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from threadpoolctl import threadpool_limits

from components.semantic_ids.shards import Ints, Matrix
from infra.svg import BLUE, GREEN, GREY, ORANGE, RED, style, svg

GROUP_COLOURS: Final = (BLUE, ORANGE, GREEN, RED, "#8064a2", "#2a9d9d", "#b5893b", "#d16ba5")
REST_COLOUR: Final = "#c8cdd8"
_CURVE_POINTS = 400  # a codebook of thousands is drawn as finely as the eye sees
_BUCKETS: Final = (1, 2, 3, 4, 5, 10, 20, 50, 100)  # the largest size of each bar; the last bar is open


def codeword_usage(counts: Sequence[Sequence[int]]) -> Markup:
    """Items a codeword, the fullest first, one panel a level; the dashed line is an even spread."""
    with style():
        figure = Figure(figsize=(9.2, 2.3), layout="constrained")
        for level, (axes, values) in enumerate(zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True)):
            heights = np.sort(np.asarray(values))[::-1]
            shown = np.unique(np.linspace(0, len(heights) - 1, _CURVE_POINTS).round().astype(np.int64))
            axes.fill_between(shown, heights[shown], step="mid", color=BLUE, alpha=0.75, linewidth=0)
            axes.axhline(float(heights.mean()), color=RED, linestyle="--", linewidth=1)
            axes.set_title(f"Level {level + 1}", loc="left", fontweight="bold")
            axes.set_xlabel("codeword, by rank")
            axes.set_ylim(bottom=0)
        return svg(figure, "sid-codewords")


def entropy_bars(entropies: Sequence[float], conditional: Sequence[float], most: float) -> Markup:
    """Bits of each level's codewords, alone and given the codewords before; the dashed line is a codebook that is used evenly.

    Args:
        entropies: a level.
        conditional: likewise, given the prefix.
        most: log2 of the codewords a level.
    """
    with style():
        figure = Figure(figsize=(4.5, 2.6), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(entropies))
        axes.bar(places - 0.2, entropies, 0.38, color=BLUE, label="alone")
        axes.bar(places + 0.2, conditional, 0.38, color=ORANGE, label="given the prefix")
        axes.axhline(most, color=RED, linestyle="--", linewidth=1)
        axes.set_xticks(places, [f"level {level + 1}" for level in places])
        axes.set_ylabel("bits")
        axes.set_ylim(0, max(most, 0.1) * 1.3)
        axes.grid(visible=False, axis="x")
        axes.legend(loc="upper center", ncols=2)
        return svg(figure, "sid-entropy")


def bucket_bars(sizes: Ints) -> Markup:
    """How many SIDs hold one item, two, ...; large sizes share a bar.

    Args:
        sizes: items of each SID that is used.
    """
    lows = (1, *(high + 1 for high in _BUCKETS[:-1]), _BUCKETS[-1] + 1)
    names = [str(low) if low == high else f"{low}-{high}" for low, high in zip(lows, _BUCKETS, strict=False)] + [f">{_BUCKETS[-1]}"]
    counts = np.bincount(np.searchsorted(_BUCKETS, sizes))
    with style():
        figure = Figure(figsize=(4.5, 2.6), layout="constrained")
        axes = figure.subplots()
        bars = axes.bar(names[: len(counts)], counts, color=BLUE, width=0.7)
        axes.bar_label(bars, labels=[f"{count:,}" if count else "" for count in counts], padding=2, fontsize=8)
        axes.set_xlabel("items that share a SID")
        axes.set_ylabel("SIDs")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.margins(y=0.12)
        axes.grid(visible=False, axis="x")
        return svg(figure, "sid-buckets")


def hit_rate_bars(rates: Sequence[tuple[str, float]]) -> Markup:
    """Horizontal bars of hit rates, the first (what the others are held against) in grey."""
    with style():
        figure = Figure(figsize=(9.2, 0.5 + 0.36 * len(rates)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh([name for name, _ in rates], [rate for _, rate in rates], color=[GREY, *[BLUE] * (len(rates) - 1)], height=0.62)
        axes.bar_label(bars, fmt="{:.4f}", padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share of neighbours found")
        return svg(figure, "sid-neighbours")


def picture(points_n2: npt.NDArray[np.float64], colours: Sequence[str], axis_names: tuple[str, str]) -> Markup:
    """Items as points, drawn in the order given.

    Args:
        points_n2: where.
        colours: one a point.
        axis_names: of x and y.
    """
    with style():
        figure = Figure(figsize=(9.2, 5.2), layout="constrained")
        axes = figure.subplots()
        x, y = points_n2.T
        axes.scatter(x, y, s=9, c=list(colours), alpha=0.75, linewidths=0, clip_on=False)  # a clip path each would double the size
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(axis_names[0])
        axes.set_ylabel(axis_names[1])
        return svg(figure, "sid-picture")


def principal_plane(rows_nD: Matrix) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
    """The rows on their two first principal axes.

    Returns:
        points_n2, whose signs and digits do not hang on the machine's linear algebra, and the share of the variance along each axis.
    """
    centred = rows_nD.astype(np.float64) - rows_nD.mean(axis=0, dtype=np.float64)
    with threadpool_limits(1, "blas"):
        left, strengths, axes = np.linalg.svd(centred, full_matrices=False)
    points, share = np.zeros((len(rows_nD), 2)), [0.0, 0.0]
    for axis in range(min(2, len(strengths))):
        sign = np.sign(axes[axis, np.abs(axes[axis]).argmax()])
        points[:, axis] = sign * left[:, axis] * strengths[axis]
        share[axis] = float(strengths[axis] ** 2 / max((strengths**2).sum(), 1e-12))
    return (points / max(float(np.abs(points).max()), 1e-12)).round(3), (share[0], share[1])
