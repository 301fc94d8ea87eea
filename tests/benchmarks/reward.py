"""The reward model on KuaiRand: AUC on the last two days against logistic regressions on user and item rates.

`python -m tests.benchmarks.reward [--quick] [--write]` runs the product's steps `sessions` and `reward` on the preset `kuairand`: fitted on
the days before, stopped by the validation day, judged on the last two days, each item in its session. Finished steps are skipped, so
a run may be stopped and repeated at will. The last line printed is JSON.

`long_view` is the log's own field: 1 where at least 18 seconds were played, or a shorter video to its end (which holds for 98 % of its
rows). `watch_ms` counts from 30 seconds on. The logistic regression has the rates of the training phase, smoothed with priors that suit the
validation day best. "Rates up to the request" are fresher: those of the user before each request and of all objectives, which is what the
reward model is told of rates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from components.reward.job import REPORT
from components.reward.job import step as reward_step
from components.sessions.job import step as sessions_step
from infra import storage
from infra.cluster import ray_session
from infra.config import Config, load_config
from infra.logs import configure_logs
from infra.steps import Run
from tests.benchmarks.data import data_folder
from tests.benchmarks.timing import announce, console, finish, parse, table

HEADLINE = "long_view"
_COLUMNS = {
    "auc": "reward model",
    "baseline_auc": "logistic regression",
    "current_rates_auc": "rates up to the request",
    "lone_item_auc": "reward model, lone items",
    "session_auc": "whole sessions",
}
QUICK = ("reward.epochs=1", "reward.hidden_size=16", "reward.tower_size=16", "reward.batch=1024", "reward.max_behaviour=16")


def configuration(workspace: Path, *, quick: bool, threads: int, seed: int) -> Config:
    """The preset on the public log."""
    folder = data_folder("kuairand_pure_14d")
    places = (f"workspace={workspace}", f"data.logs={folder / 'interactions.parquet'}", f"data.items={folder / 'items.parquet'}")
    overrides = (*places, f"reward.threads={threads}", f"seed={seed}", *(QUICK if quick else ()))
    return load_config(preset="kuairand", overrides=overrides)


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workspace", type=Path, help="where finished steps lie (.rankgr/reward)")


def main() -> None:
    """Command line."""
    arguments = parse(__doc__, extra=_options)
    workspace = (arguments.workspace or Path(".rankgr") / f"reward{'-quick' if arguments.quick else ''}").resolve()
    config = configuration(workspace, quick=arguments.quick, threads=arguments.threads, seed=arguments.seed)
    configure_logs()
    run = Run(config, run_id="reward")
    with ray_session(config.cluster):
        sessions = sessions_step(run).uri
    judged = reward_step(run, sessions)
    report = storage.read_json(storage.join(judged.uri, REPORT))
    announce()
    objectives = report["objectives"]
    rows = [
        [name, *(_figure(figures[key]) for key in _COLUMNS), f"{figures['positives']:,} of {figures['events']:,}"]
        for name, figures in objectives.items()
    ]
    table("AUC on the last two days", ["objective", *_COLUMNS.values(), "positives"], rows)
    sizes = ", ".join(f"{phase} {count:,}" for phase, count in report["sessions"].items())
    epochs = f"{report['epochs']} epochs, the best is number {report['best_epoch']}"
    for line in (f"sessions: {sizes}; {epochs}; {judged.seconds:.0f} s", config.reward.model_dump_json()):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    headline = objectives[HEADLINE]
    figures = {"auc_long_view": headline["auc"], "logistic_regression": headline["baseline_auc"]}
    finish({"bench": "reward", "quick": arguments.quick, **figures, "rates_up_to_the_request": headline["current_rates_auc"]}, arguments)


if __name__ == "__main__":
    main()
