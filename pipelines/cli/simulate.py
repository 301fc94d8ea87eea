"""`rankgr simulate`: simulated users, whose tastes change, meet the champion frozen and the champion that goes on learning."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.table import Table

from infra import storage
from infra.config import Config
from pipelines.cli.common import ConfigFile, DryRun, Overrides, Preset, announce, console, settings_of
from pipelines.local_run import local_services

SETTINGS = {
    "streaming": {
        "learning_rate": 0.0003,
        "events_per_step": 32,
        "ema_decay": 0.9,
        "ntp_level_weights": {1: 0.0, 2: 0.0, 3: 1.0, 4: 1.0},
        "gate_users": 150,
        "sync_every_s": 0,
        "checkpoint_every_s": 86_400,
    }
}
"""What suits a stream of a few thousand events an hour; an hour is over when its events are trained on, whatever the clock says.
The next-token loss has clicks alone as targets: the gate asks for clicks, most of them on what the served weights chose, and
weights that move fast do not get past it."""


def simulate(config: ConfigFile = None, preset: Preset = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """See how fast the service follows a change of taste: click-through rates by hour, streaming against frozen.

    Simulated users of the champion's catalogue ask the real service for slates, click by a model of their tastes, and their events
    go through the stream, the trainer, the gate and the sync loop. The workspace's champion and its slates stay as they are.

    Example: `rankgr simulate --set simulation.hours=12 --set simulation.shift_hour=4`
    """
    settings = settings_of(config, preset, overrides, base=SETTINGS)
    folder, simulation = storage.join(settings.workspace, "simulation"), settings.simulation
    if dry_run:
        what = f"{simulation.hours} hours of {simulation.visits_per_hour} visits, tastes change at hour {simulation.shift_hour}"
        announce(settings, [f"simulate the champion frozen and streaming: {what}", f"write {folder}/report.html"])
        return
    from serving.simulation.arms import simulate as run

    with local_services(settings, redis=False):
        result = run(settings)
    _show(result, settings, folder)


def _show(result: Any, settings: Config, folder: str) -> None:
    from components.semantic_ids.report import format_figure
    from serving.simulation.report import render_html, rows, summary

    simulation = settings.simulation
    figures = summary(result.tallies, simulation)
    about = {"champion": result.version, "users": result.users, "items": result.items, "seed": settings.seed}
    about |= {f"streaming.{name}": getattr(settings.streaming, name) for name in SETTINGS["streaming"]}
    storage.write_bytes(storage.join(folder, "report.html"), render_html(result.tallies, simulation, about).encode())
    storage.write_json(storage.join(folder, "result.json"), {**figures, "by_hour": rows(result.tallies, simulation)})
    table = Table(title="clicks an item in view")
    table.add_column("hour")
    for arm in result.tallies:
        table.add_column(arm, justify="right")
        table.add_column("version")
    for row in rows(result.tallies, simulation):
        cells = [part for arm in result.tallies for part in (format_figure(row[arm]["ctr"]), ", ".join(row[arm]["versions"]))]
        table.add_row(f"{row['hour']}{' *' if row['shifted'] else ''}", *cells)
    console.print(table)
    sys.stdout.write(f"* tastes have changed\nreport: {folder}/report.html\n{json.dumps(figures)}\n")
