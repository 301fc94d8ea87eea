"""What every KFP component does around its step: read the run's parameters, do heavy work on Ray, leave an error to be found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from infra.config import Config
from infra.errors import ConfigError, RankGRError
from infra.logs import configure_logs, get_logger
from infra.ray_jobs import run_job
from infra.steps import Run, StepResult, error_kept


@contextmanager
def step_process(step: str, config: str, run_id: str, fresh: bool) -> Iterator[Run]:
    """The run behind a component's parameters.

    An error of ours ends the process with its exit code and without a traceback; it is also left in the run's records
    (`infra.steps.raise_kept_error`), since a pipeline engine only tells that a step failed.

    Args:
        step: names the error that it leaves.
        config: the whole configuration as JSON (`rankgr config show --json`).
        run_id: names the run's records.
        fresh: redo finished steps.
    """
    configure_logs()
    try:
        run = Run(Config.from_json(config), run_id, fresh)
    except ConfigError as error:
        get_logger("pipeline").error(str(error))
        sys.exit(error.exit_code)
    try:
        with error_kept(run, step):
            yield run
    except RankGRError as error:
        get_logger("pipeline").error(str(error))
        sys.exit(error.exit_code)


def lineage(run: Run, result: StepResult) -> dict[str, str]:
    """What an artifact is to say of its origin: the step's folder, and the run, which MLflow knows by the tag `rankgr.run_id`."""
    return {"folder": result.uri, "run_id": run.run_id}


def on_ray(run: Run, step: Callable[..., StepResult], /, **inputs: str | bool) -> StepResult:
    """Do a heavy step: in this process, or as a job of the Ray cluster whose jobs API `cluster.jobs_url` names.

    Args:
        run: that the step belongs to.
        step: the function `step` of a `job.py`.
        inputs: its arguments.
    """
    return run_job(run, step, inputs) if run.config.cluster.jobs_url else step(run, **inputs)
