"""The evaluation report as one HTML page that needs nothing from outside."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from components.evaluation import charts
from components.evaluation.baselines import BASELINES
from components.evaluation.gate import Decision
from components.semantic_ids.report import format_figure, templates

_METHODS = ("retriever", *reversed(BASELINES))
_LOSSES = ("loss", "ntp", "ldpo", "bce")
_HISTORY_SHOWN = 10
_SLATE_SHOWN = 10


def render_html(
    report: Mapping[str, Any],
    *,
    decision: Decision | None = None,
    loss_curve: Sequence[Mapping[str, Any]] = (),
    sid_section: Markup | None = None,
    examples: Sequence[Mapping[str, Any]] = (),
    run: Mapping[str, Any] | None = None,
) -> str:
    """Draw the report; a part without data is left out.

    Args:
        report: method -> metrics (`hr@10`, `hr@10_se`, `<truth>/hr@10`, ...) and `users`, `items`, `cold_start_users`,
            `invalid_rate`, `unconstrained_invalid_rate`, `params`, `protocol`, `seconds`.
        decision: of the gate.
        loss_curve: points with `step` and any of `loss`, `ntp`, `ldpo`, `bce`.
        sid_section: of `components.semantic_ids.report.render_section`; the one text that is not escaped here.
        examples: `user_id`, `history` and `truth` as titles, `slate` as `title` and `score`.
        run: `versions`, `data` (counts), `config`, `seconds` (a step; taken before the report's).

    Returns:
        HTML; every other text is escaped.
    """
    run = run or {}
    methods = {name: report[name] for name in _METHODS if report.get(name)}
    metrics = _metric_names(methods)
    seconds = {name: float(value) for name, value in (run.get("seconds") or report.get("seconds") or {}).items()}
    pages = templates()
    pages.filters["pretty"] = _pretty
    page = pages.get_template("evaluation/report.html.j2").render(
        headlines=_headlines(report, methods, metrics, seconds),
        decision=decision,
        methods=methods,
        metrics=metrics,
        best=_best_methods(methods, metrics),
        bars=_bars(methods, metrics),
        loss=charts.loss_lines(loss_curve, _LOSSES) if loss_curve else None,
        sid_section=sid_section,
        examples=[_example(example) for example in examples],
        steps=charts.step_bars(seconds) if seconds else None,
        facts={name: facts for name, facts in _facts(report, run).items() if facts},
        config=run.get("config"),
    )
    return page.strip() + "\n"


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True, default=str)


def _metric_names(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Metrics of any method in the order they were written, standard errors left out."""
    names = dict.fromkeys(name for figures in methods.values() for name in figures)
    return [name for name in names if "@" in name and not name.endswith("_se")]


def _headlines(
    report: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]], metrics: Sequence[str], seconds: Mapping[str, float]
) -> list[tuple[str, str, str]]:
    """Value, name and remark of the figures at the top: the retriever's first cut-off of HR and NDCG, then the counts."""
    found: list[tuple[str, str, str]] = []
    for kind in ("hr@10", "ndcg@10") if "hr@10" in metrics else metrics[:2]:
        own = methods.get("retriever", {}).get(kind)
        if own is not None:
            found.append((format_figure(float(own)), kind.replace("hr", "HR").replace("ndcg", "NDCG"), _gain(methods, kind, own)))
    for key, name in (("invalid_rate", "invalid items"), ("unconstrained_invalid_rate", "invalid without the trie")):
        if report.get(key) is not None:
            rate = float(report[key])
            found.append((f"{rate:.2%}" if math.isfinite(rate) else "n/a", name, ""))
    for key, name in (("users", "users judged"), ("items", "items ranked")):
        if report.get(key) is not None:
            remark = f"{report['cold_start_users']:,} more without a history" if key == "users" and report.get("cold_start_users") else ""
            found.append((format_figure(report[key]), name, remark))
    if seconds:
        found.append((f"{sum(seconds.values()):,.0f} s", "all steps", ""))
    return found


def _gain(methods: Mapping[str, Mapping[str, Any]], metric: str, own: float) -> str:
    others = {name: figures[metric] for name, figures in methods.items() if name != "retriever" and figures.get(metric)}
    if not others:
        return ""
    best = max(others, key=others.__getitem__)
    gain = own / others[best] - 1
    return f"{gain:+.1%} against {best.replace('_', ' ')}" if math.isfinite(gain) else ""


def _best_methods(methods: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, str]:
    """Metric -> the method with the highest finite figure."""
    return {
        metric: max(methods, key=lambda name: value if math.isfinite(value := methods[name].get(metric, -1.0)) else -1.0)
        for metric in metrics
    }


def _bars(methods: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> Markup | None:
    """Panels for the first truth alone; further truths stand in the table."""
    kinds = {
        title: [metric for metric in metrics if metric.startswith(prefix)] for title, prefix in (("Hit rate", "hr@"), ("NDCG", "ndcg@"))
    }
    kinds = {title: names for title, names in kinds.items() if names}
    return charts.metric_bars(methods, kinds) if kinds else None


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    truth = list(example.get("truth", ()))
    slate = [{**entry, "hit": entry["title"] in truth} for entry in list(example.get("slate", ()))[:_SLATE_SHOWN]]
    return {"user_id": example["user_id"], "history": list(example.get("history", ()))[-_HISTORY_SHOWN:], "slate": slate, "truth": truth}


def _facts(report: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Title -> name and value of the small tables at the end."""
    params = {
        f"{method.replace('_', ' ')}: {name}": value
        for method, values in report.get("params", {}).items()
        for name, value in values.items()
    }
    return {
        "Data": run.get("data") or {},
        "Protocol": report.get("protocol") or {},
        "Tuned baselines": params,
        "Versions": run.get("versions") or {},
    }
