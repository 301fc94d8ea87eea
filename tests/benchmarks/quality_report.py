"""Tables and plots of the quality benchmark: Markdown, an SVG for each sweep, a summary for the last line."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from infra.config import Config
from tests.benchmarks.timing import processor

Figures = Mapping[str, float]
RESULTS: Final = Path(__file__).parent / "results"
NAMES: Final = {
    "popularity": "popularity, tuned",
    "item_knn": "item-kNN, tuned",
    "sasrec": "SASRec, full softmax",
    "ntp_clicks": "NTP alone, exposures at 0.1",
    "ntp": "NTP alone (w/o both)",
    "no_rsp": "w/o RSP",
    "no_iap": "w/o LDPO",
    "rankgr": "RankGR",
}
_CLICKS_AND_VIEWS: Final = ("hr@20", "hr@100", "hr@500", "pv/hr@20", "pv/hr@100", "pv/hr@500")
SHOWN: Final = {
    "beauty": ("hr@5", "ndcg@5", "hr@10", "ndcg@10", "hr@20", "ndcg@20"),
    "kuairand": _CLICKS_AND_VIEWS,
    "kuairand_histories": _CLICKS_AND_VIEWS,
}
SWEPT: Final = {"beauty": ("hr@10", "hr@20"), "kuairand": ("hr@100", "pv/hr@100"), "kuairand_histories": ("hr@100", "pv/hr@100")}
AXES: Final = {"lambda": "codewords retained at the last level", "alpha": "alpha, the weight of LDPO"}


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        methods: method -> for each seed: setting (phase, seen items) -> figures.
        sweeps: `lambda` and `alpha`: value -> test figures of the first seed.
    """

    methods: Mapping[str, Sequence[Mapping[str, Figures]]]
    sweeps: Mapping[str, Mapping[str, Figures]]


def write_report(results: Results, data: str, command: str, config: Config, *, folder: Path | None) -> dict[str, Any]:
    """Print the tables, write them with their plots, and return the summary: method -> mean test figures."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    shown = SHOWN[data]
    settings = sorted(next(iter(results.methods.values()))[0], key=lambda s: (not s.startswith("test"), "excluded" in s))
    lines = [f"# Quality: {data}", "", *origin(command, use_gpu=config.training.use_gpu)]
    for setting in settings:
        lines += ["", f"## {setting.capitalize()}", "", *_table(results.methods, setting, shown)]
    for name, unordered in results.sweeps.items():
        figures = dict(sorted(unordered.items(), key=lambda value: float(value[0])))
        plot = f"{data}_{name}.svg"
        (folder / plot).write_text(sweep_plot(figures, SWEPT[data], AXES[name]), "utf-8")
        lines += ["", f"## {AXES[name][0].upper()}{AXES[name][1:]}", "", *_sweep_table(figures, shown), "", f"![{name}]({plot})"]
    notes = RESULTS / f"{data}_notes.md"
    if notes.exists():
        lines += ["", "## Notes", "", notes.read_text("utf-8").strip()]
    lines += ["", "## Settings", "", "```json", _settings(config), "```"]
    sys.stdout.write("\n".join(lines) + "\n")
    (folder / f"{data}.md").write_text("\n".join(lines) + "\n", "utf-8")
    headline = settings[0]
    means = {name: _mean(runs, headline) for name, runs in results.methods.items()}
    return {
        "bench": "quality",
        "data": data,
        "seeds": {name: len(runs) for name, runs in results.methods.items()},
        "setting": headline,
        **_short(means, shown),
    }


def sweep_plot(figures: Mapping[str, Figures], metrics: Sequence[str], label: str) -> str:
    """The metrics over the values of a setting, evenly spaced, as SVG text."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.2 * len(metrics), 2.8), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
            axes.plot(list(figures), [row[metric] for row in figures.values()], marker="o", color="#2f5fd0")
            axes.set_title(metric, loc="left")
            axes.set_xlabel(label)
            axes.grid(color="#e3e7ee")
        sink = io.StringIO()
        FigureCanvasSVG(figure).print_svg(sink, metadata={"Date": None, "Creator": None})
    return sink.getvalue()


def origin(command: str, *, use_gpu: bool = False) -> list[str]:
    """What the figures were made with."""
    accelerator = f", {torch.cuda.get_device_name()}" if use_gpu and torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "ray", "polars", "numpy"))
    return [
        f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, commit {_commit()}; Python {platform.python_version()}, {versions};",
        f"{processor()}, {os.cpu_count()} cores{accelerator}, one thread a run. Mean ± sample deviation over the seeds",
        "(SIDs, first weights and the order of batches change with the seed); every method ranks the whole catalogue for every user.",
    ]


def _commit() -> str:
    """Of the code that ran, in short."""
    command = ["git", "-C", str(RESULTS), "rev-parse", "--short=10", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def told(arguments: Sequence[str]) -> str:
    """The arguments without the workspace, which is nobody else's."""
    kept = list(arguments)
    if "--workspace" in kept:
        at = kept.index("--workspace")
        kept[at : at + 2] = []
    return " ".join(text for text in kept if not text.startswith("--workspace="))


def _table(methods: Mapping[str, Sequence[Mapping[str, Figures]]], setting: str, shown: Sequence[str]) -> list[str]:
    lines = [f"| | seeds | {' | '.join(shown)} |", "|---|" + "---|" * (1 + len(shown))]
    for name in NAMES:
        if name in methods:
            cells = [cell([run[setting][metric] for run in methods[name]]) for metric in shown]
            lines.append(f"| {NAMES[name]} | {len(methods[name])} | {' | '.join(cells)} |")
    return lines


def _sweep_table(figures: Mapping[str, Figures], shown: Sequence[str]) -> list[str]:
    lines = [f"| | {' | '.join(shown)} |", "|---|" + "---|" * len(shown)]
    return lines + [f"| {value} | {' | '.join(_number(row[metric]) for metric in shown)} |" for value, row in figures.items()]


def cell(values: Sequence[float]) -> str:
    """Mean and, of more than one, sample deviation."""
    if len(values) == 1:
        return _number(values[0])
    return f"{_number(float(np.mean(values)))} ± {_number(float(np.std(values, ddof=1)))}"


def _number(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def _mean(runs: Sequence[Mapping[str, Figures]], setting: str) -> dict[str, float]:
    return {metric: float(np.mean([run[setting][metric] for run in runs])) for metric in runs[0][setting]}


def _short(means: Mapping[str, Mapping[str, float]], shown: Sequence[str]) -> dict[str, dict[str, float]]:
    return {name: {metric: round(figures[metric], 4) for metric in shown} for name, figures in means.items()}


def _settings(config: Config) -> str:
    parts = {name: getattr(config, name).model_dump_json() for name in ("semantic_ids", "retriever", "training", "decoding")}
    return "\n".join(f"{name}: {text}" for name, text in parts.items())
