"""`rankgr release`: which versions there are, and back to an earlier one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from infra import storage
from infra.config import Config
from infra.local import valkey
from infra.redis_client import REDIS_URL
from infra.slate_store import SlateStore
from infra.tracking import Registry
from pipelines.cli.common import ConfigFile, DryRun, Overrides, Preset, announce, console, settings_of
from pipelines.local_run import redis_url

app = typer.Typer(help="Versions that were released.", no_args_is_help=True)


@app.command("list")
def list_releases(
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,  # noqa: ARG001 - it only reads
) -> None:
    """Show every released version: the champion, the one that readers see, and those whose slates are still there.

    Example: `rankgr release list`
    """
    from components.release.versions import releases

    settings = settings_of(config, preset, overrides)
    with _store(settings) as store:
        found = releases(Registry(settings.tracking, settings.workspace), store)
    table = Table()
    for column in ("version", "mlflow", "registered (UTC)", "slates", "state"):
        table.add_column(column, overflow="fold")
    for one in found:
        when = datetime.fromtimestamp(one.created_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
        states = [name for name, holds in (("champion", one.is_champion), ("active", one.is_active)) if holds]
        table.add_row(one.version or "(bundle is gone)", one.number, when, "-" if one.users is None else str(one.users), ", ".join(states))
    console.print(table)


@app.command("rollback")
def rollback(
    to: Annotated[str, typer.Option("--to", metavar="VERSION", help="Bundle version or MLflow number; by default the one before.")] = "",
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Make an earlier version the champion again and show its slates; readers never see two versions mixed.

    Examples: `rankgr release rollback`, `rankgr release rollback --to 3`
    """
    from components.release.versions import roll_back

    settings = settings_of(config, preset, overrides)
    if dry_run:
        announce(settings, [f"make {to or 'the version before'} champion and active"])
        return
    with _store(settings) as store:
        target = roll_back(Registry(settings.tracking, settings.workspace), store, to)
    sys.stdout.write(f"version {target.version} (MLflow {target.number}) is champion and active\n")


@contextmanager
def _store(settings: Config) -> Iterator[SlateStore]:
    """The slate store; the workspace's own Valkey is shared with a service that runs, or started for the moment."""
    with ExitStack() as stack:
        if not (settings.slate_store.url or os.environ.get(REDIS_URL)):
            url = stack.enter_context(valkey(storage.join(settings.workspace, "valkey")))
        else:
            url = redis_url(settings)
        yield stack.enter_context(SlateStore.of(settings.slate_store, url))
