"""What commands print: figures against baselines, histories and slates with titles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from infra import storage
from infra.config import Config
from infra.errors import DataError
from infra.steps import StepResult
from pipelines.cli.common import console

METHODS = ("retriever", "item_knn", "popularity")


def report_of(records: Mapping[str, StepResult]) -> dict[str, Any]:
    """Figures of a run: methods, invalid rate, seconds of each step.

    Raises:
        DataError: the run has no evaluation.
    """
    if "evaluation" not in records:
        raise DataError("the run has no evaluation", mend="rankgr run, or rankgr evaluate")
    figures = dict(storage.read_json(storage.join(records["evaluation"].uri, "report.json")))
    figures["seconds"] = {name: record.seconds for name, record in records.items()}
    if "reward" in records:
        figures["reward"] = records["reward"].metadata["objectives"]
    if "gate" in records:
        figures["gate"] = {key: records["gate"].metadata[key] for key in ("promoted", "reasons")}
    return figures


def page_of(config: Config, records: Mapping[str, StepResult]) -> str:
    """Where the HTML report of a run lies; empty without a gate step."""
    if "gate" not in records:
        return ""
    page = storage.join(records["gate"].uri, "report.html")
    return str(Path(page).resolve()) if storage.is_local(config.workspace) else page


def print_figures(config: Config, records: Mapping[str, StepResult]) -> None:
    """Print metrics of all methods, the gate's decision and the path of the page."""
    report = report_of(records)
    names = sorted((name for name in report["retriever"] if not name.endswith("_se")), key=_natural)
    truths = ", then ".join(report["protocol"]["truths"])
    table = Table(title=f"{truths}: {report['users']} users, {report['items']} items ranked in full")
    table.add_column("metric")
    for method in METHODS:
        table.add_column(method.replace("_", "-"), justify="right")
    for name in names:
        table.add_row(name, *(_figure(report[method].get(name)) for method in METHODS))
    console.print(table)
    invalid = report["invalid_rate"]
    console.print(f"items that do not exist among those generated: {'n/a' if invalid is None else f'{invalid:.2%}'}", highlight=False)
    for name, judged in report.get("reward", {}).items():
        peer = _figure(judged["baseline_auc"])
        console.print(f"reward model: AUC({name}) {_figure(judged['auc'])}, logistic regression {peer}", highlight=False, markup=False)
    if "gate" in report:
        verdict = "promoted to champion" if report["gate"]["promoted"] else "NOT promoted"
        console.print(f"gate: {verdict} ({'; '.join(report['gate']['reasons'])})", highlight=False, markup=False)
    skipped = [name for name, record in records.items() if record.skipped]
    if skipped:
        console.print(f"skipped, finished before: {', '.join(skipped)}", highlight=False)
    if page := page_of(config, records):
        console.print(f"report: {page}", highlight=False, soft_wrap=True, markup=False)


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _natural(metric: str) -> tuple[str, int]:
    """Sorts hr@5 before hr@10."""
    name, _, k = metric.partition("@")
    return name, int(k or 0)


def print_slates(users: Sequence[Mapping[str, Any]]) -> None:
    """Print histories and slates side by side.

    Args:
        users: `user_id`, `history` (titles, latest last), `slate` (titles, best first) and `source`.
    """
    table = Table(title="slates fetched over HTTP", show_lines=True)
    for column in ("user", "watched last", "slate"):
        table.add_column(column, overflow="fold")
    for user in users:
        cells = (f"{user['user_id']}\n({user['source']})", "\n".join(user["history"]), "\n".join(user["slate"]))
        table.add_row(*map(escape, cells))
    console.print(table)


def open_page(page: str) -> None:
    """Show a page in the browser where there is a display."""
    if os.environ.get("DISPLAY"):
        import webbrowser

        webbrowser.open(f"file://{page}")
