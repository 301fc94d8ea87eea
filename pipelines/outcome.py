"""How a pipeline run ended, for the UI: promoted, not promoted with the gate's reasons, or failed with the error."""

from __future__ import annotations

from infra import errors
from infra.config import Config
from infra.steps import StepResult, raise_kept_error, run_records
from infra.tracking import Registry


def outcome_of(config: Config, run_id: str, *, succeeded: bool) -> tuple[str, str]:
    """A headline and the same with reasons and steps as Markdown.

    Args:
        config: of the run.
        run_id: whose records tell.
        succeeded: what the pipeline engine says.
    """
    records = run_records(config.workspace, run_id)
    headline, reasons = _headline(config, run_id, records, succeeded=succeeded)
    rows = [f"| {name} | {'skipped, finished before' if r.skipped else f'{r.seconds:.0f} s'} | `{r.uri}` |" for name, r in records.items()]
    table = ["", "| step | took | output |", "|---|---|---|", *rows] if rows else []
    return headline, "\n".join([f"# {headline}", "", *(f"- {reason}" for reason in reasons), *table, ""])


def _headline(config: Config, run_id: str, records: dict[str, StepResult], *, succeeded: bool) -> tuple[str, list[str]]:
    if not succeeded:
        try:
            raise_kept_error(config.workspace, run_id)
        except errors.RankGRError as error:
            return f"failed: {error.what.splitlines()[0]}", [part for part in (error.where, error.mend, *error.notes) if part]
        return "failed", ["no error of a step was left: see the log of the task that failed"]
    if "gate" not in records:
        return "checked", ["a dry run: nothing was done"]
    reasons = [str(reason) for reason in records["gate"].metadata["reasons"]]
    if not records["gate"].metadata["promoted"]:
        return "not promoted", reasons
    release = records["release"].metadata if "release" in records else {}
    page = _mlflow_page(config, str(release.get("mlflow_version", "")))
    headline = f"promoted: version {release.get('version', '?')}, MLflow version {release.get('mlflow_version', '?')}"
    return headline, [*reasons, *([f"MLflow: <{page}>"] if page else [])]


def _mlflow_page(config: Config, number: str) -> str:
    """Where the MLflow run of the release is shown; empty without a server, or where it does not answer."""
    if not number or not config.tracking.uri.startswith(("http://", "https://")):
        return ""  # nothing to show, and the libraries need not be imported
    try:
        return Registry(config.tracking, config.workspace).page_of(number)
    except errors.ServiceError:
        return ""
