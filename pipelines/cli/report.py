"""`rankgr report`: figures and page of the last run."""

from __future__ import annotations

import json
import sys

import typer

from infra.steps import latest_run
from pipelines.cli.common import ConfigFile, DryRun, Overrides, Preset, settings_of
from pipelines.cli.show import open_page, page_of, print_figures, report_of


def report(
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    as_json: bool = typer.Option(False, "--json", help="All figures as JSON."),
    show: bool = typer.Option(False, "--open", help="Open the page in the browser."),
    dry_run: DryRun = False,  # noqa: ARG001 - it only reads
) -> None:
    """Show the figures of the last run and the path of its HTML report.

    Example: `rankgr report --json`
    """
    settings = settings_of(config, preset, overrides)
    _, records = latest_run(settings.workspace)
    if as_json:
        sys.stdout.write(json.dumps(report_of(records), indent=2) + "\n")
    else:
        print_figures(settings, records)
    if show:
        open_page(page_of(settings, records))
