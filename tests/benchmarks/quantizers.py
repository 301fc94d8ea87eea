"""Retrieval by quantizer: `python -m tests.benchmarks.quantizers [--data beauty] [--seeds 0] [--quick]`.

The same plain retriever (variant `ntp` of `tests.benchmarks.quality`) on the SIDs of three quantizers, of content alone and with
the preset's collaborative signal. Prints a table and writes `tests/benchmarks/results/quantizers_<data>.md`; finished steps are
skipped, so a run may be stopped and repeated at will. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from components.semantic_ids.job import STATS
from components.semantic_ids.job import step as semantic_ids_step
from infra import records as r
from infra import storage
from infra.cluster import ray_session
from infra.config import load_config
from infra.logs import configure_logs
from tests.benchmarks.quality import TASKS, VARIANTS, Bench, setting_name
from tests.benchmarks.quality_report import RESULTS, SHOWN, cell, origin, told

QUANTIZERS: Final = ("rq_kmeans", "balanced_rq_kmeans", "rq_vae")
FEATURES: Final = {
    "content": ("semantic_ids.collaborative_weight=0",),
    "collaborative": (),
    "adapter": ("semantic_ids.collaborative=adapter",),
}


@dataclass(frozen=True)
class Outcome:
    """SIDs of one kind.

    Attributes:
        figures: test metrics, one a seed.
        stats: of the first seed's table.
    """

    figures: list[dict[str, float]]
    stats: dict[str, Any]


def judge(bench: Bench, quantizer: str, features: str, seeds: list[int]) -> Outcome:
    """Train and judge the retriever on such SIDs."""
    overrides = (*VARIANTS["ntp"], f"semantic_ids.quantizer={quantizer}", *FEATURES[features])
    headline = setting_name(r.Phase.TEST, exclude_seen=bench.task.exclude_seen[0])
    figures = [bench.retriever(overrides, seed=seed)[headline] for seed in seeds]
    sids = semantic_ids_step(bench.run(overrides, seed=seeds[0]), bench.sessions).uri
    return Outcome(figures, dict(storage.read_json(storage.join(sids, STATS))))


def row(quantizer: str, features: str, outcome: Outcome, shown: tuple[str, ...]) -> str:
    """Of the table, in Markdown."""
    stats = outcome.stats
    levels = " / ".join(f"{level['utilisation']:.2f}" for level in stats["levels"])
    cells = [cell([figures[metric] for figures in outcome.figures]) for metric in shown]
    more = [f"{stats['collision_rate_before']:.3f}", f"{stats['collision_rate']:.3f}", f"{stats['moved']:,}", levels]
    return f"| {quantizer} | {features} | {len(outcome.figures)} | {' | '.join([*cells, *more])} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quantizers", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="beauty", choices=list(TASKS))
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="one epoch, 500 users: does everything run? Figures mean nothing")
    parser.add_argument("--features", nargs="*", default=["content", "collaborative"], choices=list(FEATURES))
    parser.add_argument("--workspace", type=Path, help="where runs and checkpoints lie (.rankgr/quality/<data>)")
    options = parser.parse_args()
    task, seeds = TASKS[options.data], [int(seed) for seed in options.seeds.split(",")]
    task = replace(task, exclude_seen=task.exclude_seen[:1])  # the headline alone
    workspace = (options.workspace or Path(".rankgr") / "quality" / f"{task.name}{'-quick' if options.quick else ''}").resolve()
    configure_logs()
    with ExitStack() as stack:
        stack.enter_context(ray_session(load_config(preset=task.preset).cluster))
        bench = Bench(task, workspace, quick=options.quick, phases=(r.Phase.TEST,))
        outcomes = {pair: judge(bench, *pair, seeds) for pair in product(QUANTIZERS, options.features)}
    shown = SHOWN[task.name][:4]
    columns = ["quantizer", "features", "seeds", *shown, "collisions before", "after", "moved", "codewords used"]
    lines = [f"# Quantizers: {task.name}", "", *origin(f"python -m tests.benchmarks.quantizers {told(sys.argv[1:])}"), ""]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(row(*pair, found, shown) for pair, found in outcomes.items())]
    notes = RESULTS / f"quantizers_{task.name}_notes.md"
    if notes.exists():
        lines += ["", "## Notes", "", notes.read_text("utf-8").strip()]
    sys.stdout.write("\n".join(lines) + "\n")
    folder = workspace if options.quick else RESULTS
    (folder / f"quantizers_{task.name}.md").write_text("\n".join(lines) + "\n", "utf-8")
    metric = shown[2]
    summary = {" ".join(pair): round(sum(f[metric] for f in found.figures) / len(seeds), 4) for pair, found in outcomes.items()}
    sys.stdout.write(json.dumps({"bench": "quantizers", "data": task.name, "metric": metric, **summary}) + "\n")


if __name__ == "__main__":
    main()
