"""The pipeline on this machine: `kfp.local` as the engine, embedded services, nothing left behind."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import UTC, datetime

from infra import storage
from infra.cluster import RAYS_NICENESS, ray_session
from infra.config import Config
from infra.errors import RankGRError
from infra.local import no_process_left, valkey
from infra.logs import get_logger
from infra.redis_client import REDIS_URL
from infra.slate_store import SlateStore
from infra.steps import StepResult, raise_kept_error, remember_run, run_records


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command with status 130 and a hint; typer would make them 1 and "Aborted"."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not _interrupted(error):
            raise
        if not isinstance(error, KeyboardInterrupt):
            get_logger("shutdown").warning("an error while stopping", error=repr(error))
        sys.stderr.write("interrupted; run the same command again to go on\n")
        raise SystemExit(130) from None


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or came up while something was put in order after it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


@contextmanager
def local_services(config: Config, *, redis: bool = True, ray: bool = True, niceness: int = RAYS_NICENESS) -> Iterator[None]:
    """Ray and, unless one is configured, a Valkey in the workspace; child processes find both in the environment.

    Args:
        config: where they are.
        redis: Valkey too.
        ray: Ray too.
        niceness: see `infra.cluster.ray_session`.
    """
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        stack.enter_context(no_process_left())
        if redis and not (config.slate_store.url or os.environ.get(REDIS_URL)):
            url = stack.enter_context(valkey(storage.join(config.workspace, "valkey")))
            os.environ[REDIS_URL] = url
            stack.callback(os.environ.pop, REDIS_URL, None)
        if redis:
            with SlateStore.of(config.slate_store, redis_url(config)) as store:  # now rather than after an hour of training
                store.ping()
        if ray:
            stack.enter_context(ray_session(config.cluster, niceness=niceness))
        yield


def redis_url(config: Config) -> str:
    """Where the slates are."""
    return config.slate_store.url or os.environ.get(REDIS_URL, "")


def new_run_id() -> str:
    """Names a run by the time of its start."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]


def run_pipeline(config: Config, *, run_id: str, fresh: bool, refresh: bool = False) -> dict[str, StepResult]:
    """Run the training pipeline, or the refresh pipeline, with `kfp.local`, each step a process of its own.

    Needs `local_services`.

    Returns:
        the steps that ran or were skipped; without `release` where the gate refused.

    Raises:
        RankGRError: the error of the step that failed.
    """
    from kfp import local

    from pipelines.parameters import refuse_visible_passwords
    from pipelines.placement import Placement
    from pipelines.refresh import refresh_pipeline
    from pipelines.training import training_pipeline

    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=os.path.join(_scratch(config), "kfp"), raise_on_error=True)
    # A task that a condition leaves out makes kfp warn on the root logger, which would print without a handler.
    logging.getLogger().addHandler(logging.NullHandler())
    refuse_visible_passwords(config)
    start = time.monotonic()
    try:
        with redirect_stdout(_StepLines()):
            # Here a step that fails is not tried again: nothing changes until somebody mends it.
            pipeline = (refresh_pipeline if refresh else training_pipeline)(Placement(secret="", retries=0))
            pipeline(preset="", config=config.to_json(), run_id=run_id, fresh=fresh)
    except RuntimeError as error:
        raise_kept_error(config.workspace, run_id)
        raise RankGRError(f"the pipeline failed: {error}", mend="see the log above; run again to go on") from error
    get_logger("pipeline").info("pipeline finished", seconds=round(time.monotonic() - start, 1), run=run_id)
    remember_run(config.workspace, run_id)
    return run_records(config.workspace, run_id)


def _scratch(config: Config) -> str:
    """A local folder for kfp's own files, which are small."""
    return config.workspace if storage.is_local(config.workspace) else ".rankgr"


class _StepLines(io.TextIOBase):
    """Passes on what the steps log, with tracebacks, and drops what kfp prints around it."""

    _OURS = re.compile(r"^\s{0,4}(\d\d:\d\d:\d\d \[|\{\"|Traceback)")
    _THEIRS = re.compile(r"^\s{0,4}(\[KFP|\d\d:\d\d:\d\d\.\d{3} - |\{$|Output: |Input|$)")

    def __init__(self) -> None:
        self._pending, self._goes_on = "", False

    def write(self, text: str) -> int:
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            if self._OURS.match(line):
                self._goes_on = "[error" in line or "Traceback" in line
                sys.stderr.write(line.removeprefix("    ") + "\n")
            elif self._goes_on and not self._THEIRS.match(line):  # further lines of an error or a traceback
                sys.stderr.write(line.removeprefix("    ") + "\n")
        sys.stderr.flush()
        return len(text)
