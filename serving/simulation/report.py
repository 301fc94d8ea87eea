"""What came of a simulation: figures, a chart, a page that needs nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from components.semantic_ids.report import templates
from infra.service_sections import SimulationConfig
from infra.svg import BLUE, GREY, ORANGE, style, svg
from serving.simulation.loop import FROZEN, STREAMING, Tally

_COLOURS = {FROZEN: GREY, STREAMING: BLUE}
_RECOVERED = 0.9
_SMOOTH = 3  # hours
Tallies = Mapping[str, Sequence[Tally]]


def ctr(tallies: Sequence[Tally]) -> float:
    """Clicks an item in view; NaN where none came into view."""
    views = sum(one.views for one in tallies)
    return sum(one.clicks for one in tallies) / views if views else math.nan


def by_hour(tallies: Sequence[Tally], hours: int) -> list[list[Tally]]:
    """The tallies of each hour."""
    return [[one for one in tallies if one.hour == hour] for hour in range(hours)]


def summary(found: Tallies, settings: SimulationConfig) -> dict[str, Any]:
    """JSON values: click-through rates of each arm before and after the shift, and how fast it came back.

    `recovered_after_h`: hours from the shift until the rate of three hours together was nine tenths of that before the shift; null
    if it never was. `after_z`: the difference of the rates after the shift in standard errors, views taken as independent.
    """
    figures: dict[str, Any] = {"hours": settings.hours, "shift_hour": settings.shift_hour}
    for arm, tallies in found.items():
        before, after = ([one for one in tallies if (one.hour < settings.shift_hour) == early] for early in (True, False))
        late = [one for one in after if one.hour >= (settings.shift_hour + settings.hours) // 2]
        figures[arm] = {
            "ctr_before": _rounded(ctr(before)),
            "ctr_after": _rounded(ctr(after)),
            "ctr_second_half_after": _rounded(ctr(late)),
            "recovered_after_h": _recovery(tallies, ctr(before), settings),
            "versions": len({one.version for one in tallies}),
            "fresh_share": _rounded(sum(one.fresh for one in tallies) / max(sum(one.visits for one in tallies), 1)),
            "views": sum(one.views for one in tallies),
        }
    ours, theirs = ([one for one in found[arm] if one.hour >= settings.shift_hour] for arm in (STREAMING, FROZEN))
    figures["after_gain"] = _rounded(ctr(ours) / ctr(theirs) - 1) if ctr(theirs) else None
    figures["after_z"] = _rounded(_z(ours, theirs), 1)
    return figures


def _rounded(value: float, digits: int = 4) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def _recovery(tallies: Sequence[Tally], before: float, settings: SimulationConfig) -> int | None:
    hours = by_hour(tallies, settings.hours)
    for hour in range(settings.shift_hour, settings.hours - _SMOOTH + 1):
        if ctr([one for some in hours[hour : hour + _SMOOTH] for one in some]) >= _RECOVERED * before:
            return hour - settings.shift_hour
    return None


def _z(one: Sequence[Tally], other: Sequence[Tally]) -> float:
    variance = sum(ctr(tallies) * (1 - ctr(tallies)) / max(sum(t.views for t in tallies), 1) for tallies in (one, other))
    return (ctr(one) - ctr(other)) / math.sqrt(variance) if variance > 0 else math.nan


def rows(found: Tallies, settings: SimulationConfig) -> list[dict[str, Any]]:
    """A row for each hour: rate and versions of each arm."""
    hours = {arm: by_hour(tallies, settings.hours) for arm, tallies in found.items()}
    return [
        {"hour": hour, "shifted": hour >= settings.shift_hour}
        | {arm: {"ctr": _rounded(ctr(of[hour])), "versions": [one.version for one in of[hour]]} for arm, of in hours.items()}
        for hour in range(settings.hours)
    ]


def versions(found: Tallies) -> list[dict[str, Any]]:
    """A row for each arm and model version, in the order in which they were shown."""
    of_version: dict[tuple[str, str], list[Tally]] = {}
    for arm, tallies in found.items():
        for one in tallies:
            of_version.setdefault((arm, one.version), []).append(one)
    return [
        {
            "arm": arm,
            "version": version,
            "hours": f"{some[0].hour} to {some[-1].hour}",
            "visits": sum(one.visits for one in some),
            "views": sum(one.views for one in some),
            "clicks": sum(one.clicks for one in some),
            "purchases": sum(one.purchases for one in some),
            "ctr": ctr(some),
        }
        for (arm, version), some in of_version.items()
    ]


def chart(found: Tallies, settings: SimulationConfig) -> Markup:
    """The click-through rate of each arm over the hours; dots where another version came to be shown."""
    with style():
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        axes = figure.subplots()
        for arm, tallies in found.items():
            hours = by_hour(tallies, settings.hours)
            rates, shown = [ctr(some) for some in hours], [some[-1].version if some else "" for some in hours]
            axes.plot(range(settings.hours), rates, color=_COLOURS[arm], linewidth=2, label=arm)
            new = [hour for hour in range(1, settings.hours) if shown[hour] != shown[hour - 1]]
            axes.plot(new, [rates[hour] for hour in new], "o", color=_COLOURS[arm], markersize=4.5)
        axes.axvline(settings.shift_hour - 0.5, color=ORANGE, linestyle="--", linewidth=1.4, label="tastes change")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("simulated hour")
        axes.set_ylabel("clicks an item in view")
        axes.legend(ncols=3)
        return svg(figure, "simulation")


def render_html(found: Tallies, settings: SimulationConfig, about: Mapping[str, Any]) -> str:
    """The page; all texts are escaped.

    Args:
        found: arm -> tallies.
        settings: of the simulation.
        about: names and values that say what was simulated.
    """
    source = Path(__file__).with_name("report.html.j2").read_text("utf-8")
    page = (
        templates()
        .from_string(source)
        .render(
            figures=summary(found, settings),
            arms=list(found),
            chart=chart(found, settings),
            rows=rows(found, settings),
            versions=versions(found),
            about={**about, **settings.model_dump()},
        )
    )
    return page.strip() + "\n"
