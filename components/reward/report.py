"""The reward model's report as one HTML page that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup
from matplotlib.figure import Figure

from components.semantic_ids.report import templates
from infra.svg import BLUE, GREY, ORANGE, style, svg

_COLUMNS: Final = {
    "auc": "AUC",
    "baseline_auc": "logistic regression",
    "current_rates_auc": "with rates up to the request",
    "lone_item_auc": "AUC, lone items",
    "session_auc": "AUC, sessions",
    "positives": "positives",
    "events": "items judged",
}


def render_page(
    report: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    calibrations: Mapping[str, Mapping[str, Sequence[float]]],
    losses: Sequence[Mapping[str, float | None]],
) -> str:
    """Draw the report; a part without data is left out.

    Args:
        report: of the step `reward`.
        curves: objective -> method -> `fpr`, `tpr`.
        calibrations: objective -> `predicted`, `observed`.
        losses: of each epoch, `train` and `valid`.

    Returns:
        HTML; every text is escaped.
    """
    judged = {name: methods for name, methods in curves.items() if methods["reward model"]["fpr"]}
    page = templates().get_template("reward/report.html.j2")
    drawn = page.render(
        report=report,
        columns=_COLUMNS,
        rocs=_roc_panels(judged) if judged else None,
        calibration=_calibration_panels({name: calibrations[name] for name in judged}) if judged else None,
        loss=_loss_lines(losses) if losses else None,
    )
    return drawn.strip() + "\n"


def _roc_panels(curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Markup:
    with style():
        figure = Figure(figsize=(min(3.1 * len(curves), 9.2), 3.1), layout="constrained")
        for axes, (name, methods) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=0.8)
            for colour, (method, points) in zip((BLUE, ORANGE), methods.items(), strict=True):
                axes.plot(points["fpr"], points["tpr"], color=colour, label=method)
            axes.set_title(name, loc="left", fontweight="bold")
            axes.set_xlabel("false positives")
            axes.set_aspect("equal")
            axes.legend(loc="lower right", fontsize=8)
        return svg(figure, "reward roc")


def _calibration_panels(calibrations: Mapping[str, Mapping[str, Sequence[float]]]) -> Markup:
    with style():
        figure = Figure(figsize=(min(3.1 * len(calibrations), 9.2), 2.9), layout="constrained")
        for axes, (name, points) in zip(figure.subplots(1, len(calibrations), squeeze=False)[0], calibrations.items(), strict=True):
            top = max(*points["predicted"], *points["observed"])
            axes.plot([0, top], [0, top], color=GREY, linestyle="--", linewidth=0.8)
            axes.plot(points["predicted"], points["observed"], color=BLUE, marker="o", markersize=3.5)
            axes.set_title(name, loc="left", fontweight="bold")
            axes.set_xlabel("predicted")
        return svg(figure, "reward calibration")


def _loss_lines(losses: Sequence[Mapping[str, float | None]]) -> Markup:
    with style():
        figure = Figure(figsize=(9.2, 2.6), layout="constrained")
        axes = figure.subplots()
        for name, colour in (("train", BLUE), ("valid", ORANGE)):
            points = [(epoch, point[name]) for epoch, point in enumerate(losses, 1) if point[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=name)
        axes.set_xlabel("epoch")
        axes.legend()
        return svg(figure, "reward loss")
