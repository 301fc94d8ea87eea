"""Options that commands share, and the configuration they amount to."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from infra.config import PRESETS, Config, load_config
from infra.logs import configure_logs

ConfigFile = Annotated[str | None, typer.Option("--config", help="YAML file with settings; may name a `preset:`.")]
Preset = Annotated[str | None, typer.Option("--preset", help=f"Settings to start from: {', '.join(PRESETS)}.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; may be repeated.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the settings, say what would be done, do nothing.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Redo steps that were finished before.")]
Logs = Annotated[str | None, typer.Option("--logs", help="Events: a Parquet, CSV or JSONL file or folder, local or s3://.")]
Items = Annotated[str | None, typer.Option("--items", help="Catalogue, in the same formats.")]

console = Console()


def settings_of(
    config: str | None,
    preset: str | None,
    overrides: list[str] | None,
    *,
    logs: str | None = None,
    items: str | None = None,
    default_preset: str | None = None,
    base: Mapping[str, Any] | None = None,
    mapped: Iterable[str] = (),
) -> Config:
    """The configuration behind a command's options."""
    configure_logs()
    given = [*mapped, *(overrides or [])]
    given += [f"data.logs={yaml.safe_dump(logs).splitlines()[0]}"] if logs else []
    given += [f"data.items={yaml.safe_dump(items).splitlines()[0]}"] if items else []
    return load_config(config, preset=preset, overrides=given, base=base, fallback_preset=default_preset)


def announce(config: Config, what: list[str]) -> None:
    """Say what a dry run would do."""
    sys.stdout.write(f"workspace: {config.workspace}\n" + "".join(f"would {line}\n" for line in what))
