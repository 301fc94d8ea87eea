"""What every KFP component does around its step: read the run's parameters, leave an error where the caller finds it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from infra import errors, storage
from infra.config import Config
from infra.logs import configure_logs, get_logger
from infra.steps import Run

_ERROR = "error.json"


@contextmanager
def step_process(config: str, run_id: str, fresh: bool) -> Iterator[Run]:
    """The run behind a component's parameters.

    An error of ours ends the process with its exit code and without a traceback; it is also left in the run's records
    for `raise_saved_error`, since a pipeline engine only tells that a step failed.

    Args:
        config: the whole configuration as JSON (`rankgr config show --json`).
        run_id: names the run's records.
        fresh: redo finished steps.
    """
    configure_logs()
    try:
        settings = Config.from_json(config)
    except errors.ConfigError as error:
        get_logger("pipeline").error(str(error))
        sys.exit(error.exit_code)
    error_uri = storage.join(settings.workspace, "runs", run_id, _ERROR)
    try:
        storage.remove(error_uri)  # of an earlier attempt
        yield Run(settings, run_id, fresh)
    except errors.RankGRError as error:
        get_logger("pipeline").error(str(error))
        with suppress(errors.StorageError):  # the storage may be what failed
            storage.write_json(error_uri, errors.describe(error))
        sys.exit(error.exit_code)


def raise_saved_error(workspace: str, run_id: str) -> None:
    """Raise the error that a step of a run left behind, if any."""
    uri = storage.join(workspace, "runs", run_id, _ERROR)
    if storage.exists(uri):
        errors.raise_described(storage.read_json(uri))
