"""`rankgr data`: get the example data, look into one's own."""

from __future__ import annotations

import sys
from pathlib import Path

import typer
from rich.table import Table

from components.sessions.check import event_columns
from components.sessions.job import check_sources
from components.sessions.sources import column_names, data_files, read_frame
from pipelines import movielens
from pipelines.cli.common import ConfigFile, DryRun, Items, Logs, Overrides, Preset, console, settings_of

app = typer.Typer(help="Get the example data, look into your own.", no_args_is_help=True)


@app.command()
def get(
    folder: Path = typer.Option(movielens.FOLDER, "--folder", help="Where the files go."),
    config: ConfigFile = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Fetch MovieLens-100K (100,000 ratings, 1,682 films) as events.parquet and items.parquet.

    Example: `rankgr data get --folder data/movielens`
    """
    settings_of(config, None, overrides)  # nothing here depends on them, but what is wrong with them is said now
    if dry_run:
        sys.stdout.write(f"would write {folder / movielens.EVENTS} and {folder / movielens.ITEMS}\n")
        return
    for path in movielens.fetch(folder):
        sys.stdout.write(f"{path}\n")


@app.command()
def describe(
    logs: Logs = None,
    items: Items = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Check files against the settings and show their size and columns.

    Example: `rankgr data describe --logs events.csv --items items.csv --set data.columns.user_id=uid`
    """
    settings = settings_of(config, preset, overrides, logs=logs, items=items)
    for name, uri in (("events", settings.data.logs), ("items", settings.data.items)):
        if uri:
            kind, files = data_files(uri)
            sys.stdout.write(f"{name}: {uri}: {len(files)} {kind} file{'s' * (len(files) > 1)}, columns {', '.join(column_names(uri))}\n")
    check_sources(settings.data)
    if dry_run:
        return
    log = read_frame(settings.data.logs)
    table = Table(title=f"{len(log):,} events")
    for title in ("column", "read as", "nulls", "distinct", "smallest", "largest"):
        table.add_column(title)
    for setting, column in event_columns(settings.data).items():
        values = log[column]
        table.add_row(column, setting, str(values.null_count()), f"{values.n_unique():,}", str(values.min()), str(values.max()))
    console.print(table)
