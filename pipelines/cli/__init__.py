"""The `rankgr` command."""

from __future__ import annotations

import sys

import typer

from infra.errors import RankGRError
from pipelines.cli import data, doctor, kubeflow, plan, quickstart, release, report, run, serve, settings, sids, simulate, stream

app = typer.Typer(
    name="rankgr",
    help="Generative retrieval with semantic IDs, from raw logs to served slates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("quickstart")(quickstart.quickstart)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app, name="data")
app.add_typer(settings.app, name="config")
app.add_typer(sids.app, name="sids")
app.add_typer(release.app, name="release")
app.command("run")(run.run)
app.command("train")(run.train)
app.command("evaluate")(run.evaluate)
app.command("precompute")(run.precompute)
app.command("refresh")(run.refresh)
app.command("compile")(kubeflow.compile_pipelines)
app.command("submit")(kubeflow.submit)
app.command("plan")(plan.plan)
app.command("serve")(serve.serve)
app.command("stream")(stream.stream)
app.command("simulate")(simulate.simulate)
app.command("recommend")(serve.recommend)
app.command("report")(report.report)


def main() -> None:
    """Entry point: errors of ours become one message and their exit code."""
    try:
        app()
    except RankGRError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
