"""`rankgr sids`: build semantic IDs and look at them, add items to the champion, plan for a large catalogue."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from components.sessions.catalogue import build_catalogue, catalogue_table
from infra import storage
from infra.config import Config
from infra.errors import ConfigError
from infra.steps import Run
from infra.tracking import Registry
from pipelines.cli.common import ConfigFile, DryRun, Fresh, Items, Logs, Overrides, Preset, announce, console, settings_of
from pipelines.cli.run import checked
from pipelines.local_run import interruptible, local_services, new_run_id

app = typer.Typer(invoke_without_command=True)


@app.callback()
def build(
    context: typer.Context,
    logs: Logs = None,
    items: Items = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Semantic IDs: do the steps up to the SID table and show its figures; finished ones are skipped.

    Example: `rankgr sids --preset beauty --logs events.parquet --items items.parquet --set semantic_ids.quantizer=rq_vae`
    """
    if context.invoked_subcommand:
        if any((logs, items, config, preset, overrides, fresh, dry_run)):
            raise ConfigError("options stand before the subcommand", mend=f"write them behind `rankgr sids {context.invoked_subcommand}`")
        return
    settings = checked(settings_of(config, preset, overrides, logs=logs, items=items))
    if dry_run:
        announce(settings, ["run the step sessions", "run the step semantic_ids"])
        return
    from components.semantic_ids import job
    from components.sessions import job as sessions_job

    with local_services(settings, redis=False):
        run = Run(settings, new_run_id(), fresh)
        result = job.step(run, sessions_job.step(run).uri)
    _print(storage.read_json(storage.join(result.uri, job.STATS)))
    page = storage.join(result.uri, job.PAGE)
    console.print(f"report: {Path(page).resolve() if storage.is_local(page) else page}", highlight=False, soft_wrap=True, markup=False)
    sys.stdout.write(f"{result.uri}\n")


@app.command()
def add(
    items: Annotated[str, typer.Option("--items", help="New items: a Parquet, CSV or JSONL file, local or s3://.")],
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Give new items SIDs on the champion's frozen codebooks and release it with them; nothing is trained.

    Columns are named as in the champion's settings. `rankgr precompute` then publishes slates of the grown model.

    Example: `rankgr sids add --items new_items.parquet`
    """
    from components.release.grow import grow_champion

    settings = settings_of(config, preset, overrides)
    champion = Registry(settings.tracking, settings.workspace).require_champion()
    columns = Config.from_json(storage.read_bytes(storage.join(champion.bundle_uri, "config.json")).decode()).data.columns
    settings = settings_of(config, preset, overrides, items=items, base={"data": {"columns": columns.model_dump()}})
    frame, bad, counts = build_catalogue(settings.data, [])
    if dry_run:
        announce(settings, [f"add up to {counts['items']} items to the champion"])
        return
    for reason, raw in zip(bad["reason"], bad["raw"], strict=True):
        sys.stderr.write(f"left out, {reason}: {raw}\n")
    with interruptible():
        result = grow_champion(Run(settings), catalogue_table(frame, [0] * len(frame)))
    if result is None:
        sys.stdout.write(f"nothing new: the champion has all {counts['items']} items\n")
        return
    added = result.metadata["added"]
    known = counts["items"] - len(added)
    console.print(f"{len(added)} items added, {known} were known, model {result.metadata['version']}", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("item")
    table.add_column("SID")
    for item_id, codes in list(added.items())[:20]:
        table.add_row(item_id, " ".join(map(str, codes)))
    console.print(table)
    sys.stdout.write(f"{result.uri}\n")


@app.command()
def plan(
    items: Annotated[int, typer.Option("--count", min=1, help="Items.")],
    dims: Annotated[int, typer.Option("--dims", min=1, help="Width of their features.")] = 64,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,  # noqa: ARG001 - it only calculates
) -> None:
    """Say what a catalogue of this size takes: passes, memory of a worker and of the driver, files, arithmetic.

    Example: `rankgr sids plan --count 10000000 --dims 64 --set semantic_ids.workers=8 --set semantic_ids.codes=4096`
    """
    from components.semantic_ids.plan import plan_of

    settings = settings_of(config, preset, overrides)
    console.print(f"{items:,} items x {dims} dimensions, {settings.semantic_ids.quantizer}", highlight=False)
    table = Table()
    table.add_column("what")
    table.add_column("", justify="right")
    for name, value in plan_of(items, dims, settings.semantic_ids).rows():
        table.add_row(name, value)
    console.print(table)


def _print(stats: dict[str, Any]) -> None:
    """Figures of a SID table, overall and by level."""
    console.print(f"{stats['items']:,} items, {stats['quantizer']}", highlight=False)
    table = Table()
    table.add_column("figure")
    for level in range(len(stats["levels"])):
        table.add_column(f"level {level + 1}", justify="right")
    for name in ("utilisation", "perplexity", "gini", "entropy", "conditional_entropy"):
        table.add_row(name.replace("_", " "), *(f"{level[name]:,.4f}" for level in stats["levels"]))
    console.print(table)
    for name in ("collision_rate_before", "collision_rate", "largest_bucket", "moved", "reconstruction_error"):
        console.print(f"{name.replace('_', ' ')}: {stats[name]:,.4f}".removesuffix(".0000"), highlight=False)
    if signal := stats.get("signal"):
        verdict = "accepted" if signal["accepted"] else "REFUSED, content alone is used"
        console.print(f"collaborative signal {signal['kind']} {verdict}: {signal['reason']}", highlight=False, soft_wrap=True)
    if "churn" in stats:
        console.print(f"churn: {stats['churn']['changed']:.2%} of {stats['churn']['items']:,} items have another SID", highlight=False)
