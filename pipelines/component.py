"""KFP faces of a run's first step, which checks its parameters, and of its last one, which says how it ended."""

from typing import NamedTuple

from kfp import dsl

from infra.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def validate_parameters(
    preset: str,
    logs_uri: str,
    items_uri: str,
    overrides: list[str],
    config: str,
    run_id: str,
    job_id: str,
    refresh: bool,
    fresh: bool,
) -> NamedTuple("Outputs", [("config", str), ("run_id", str)]):  # type: ignore[valid-type]
    """Parameters to the configuration of all steps, checked with the data; whatever is wrong is said at once."""
    import sys
    from contextlib import suppress
    from typing import NamedTuple

    from infra.errors import RankGRError
    from infra.logs import configure_logs, get_logger
    from infra.steps import Run, forget_errors, keep_error
    from pipelines.parameters import refreshed, resolve

    configure_logs()
    try:
        settings = resolve(preset, logs_uri, items_uri, overrides, config)
        forget_errors(Run(settings, run_id or job_id))
        settings = refreshed(settings, fresh=fresh) if refresh else settings
    except RankGRError as error:
        # What is wrong with the settings the last step finds by itself; of the data it has to be told.
        with suppress(RankGRError):
            known = Run(resolve(preset, logs_uri, items_uri, overrides, config, look=False), run_id or job_id)
            forget_errors(known)
            keep_error(known, "parameters", error)
        get_logger("parameters").error(str(error))
        sys.exit(error.exit_code)
    Outputs = NamedTuple("Outputs", [("config", str), ("run_id", str)])  # noqa: UP014 - as KFP reads it above
    return Outputs(settings.to_json(), run_id or job_id)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report_outcome(
    preset: str,
    logs_uri: str,
    items_uri: str,
    overrides: list[str],
    config: str,
    run_id: str,
    job_id: str,
    outcome: dsl.Output[dsl.Markdown],
    status: dsl.PipelineTaskFinalStatus,
) -> None:
    """Say how the run ended, whatever happened: promoted, not promoted with reasons, or failed with the error."""
    from pathlib import Path

    from infra.errors import RankGRError
    from infra.logs import configure_logs, get_logger
    from infra.steps import remember_run
    from pipelines.outcome import outcome_of
    from pipelines.parameters import resolve

    configure_logs()
    succeeded = status.state == "SUCCEEDED"
    try:
        settings = resolve(preset, logs_uri, items_uri, overrides, config, look=False)
        headline, page = outcome_of(settings, run_id or job_id, succeeded=succeeded)
        if headline.startswith(("promoted", "not promoted")):
            remember_run(settings.workspace, run_id or job_id)
    except RankGRError as error:
        headline, page = "failed", f"# failed\n\n{error}\n"
    get_logger("pipeline").info("outcome", outcome=headline)
    Path(outcome.path).write_text(page, "utf-8")
