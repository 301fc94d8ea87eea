"""`rankgr config`: show and explain settings."""

from __future__ import annotations

import json
import sys

import typer
import yaml

from infra.config import Config
from pipelines.cli.common import ConfigFile, DryRun, Overrides, Preset, settings_of

app = typer.Typer(help="Show and explain settings.", no_args_is_help=True)


@app.command()
def show(
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,  # noqa: ARG001 - it only reads
    as_json: bool = typer.Option(False, "--json", help="JSON, the form that the pipeline's parameter `config` takes."),
) -> None:
    """Print all settings with their values.

    Example: `rankgr config show --preset small --set training.epochs=3`
    """
    settings = settings_of(config, preset, overrides)
    sys.stdout.write(settings.to_json() + "\n" if as_json else yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))


@app.command()
def schema(dry_run: DryRun = False) -> None:  # noqa: ARG001 - it only reads
    """Print the JSON schema: every key, its type, range, default and meaning.

    Example: `rankgr config schema | less`
    """
    sys.stdout.write(json.dumps(Config.model_json_schema(), indent=2) + "\n")
