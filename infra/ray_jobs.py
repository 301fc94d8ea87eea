"""Steps as jobs of a Ray cluster: submitted through its jobs API, logs followed, stopped when the caller is.

`python -m infra.ray_jobs` says how large the upload of the code is.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from infra import storage
from infra.cluster import quiet_ray, use_token
from infra.errors import ServiceError
from infra.local import signals_interrupt
from infra.logs import configure_logs, get_logger
from infra.service_sections import ClusterConfig
from infra.steps import Run, StepResult, name_of, raise_kept_error, run_records

ROOT = Path(__file__).resolve().parent.parent
RUNTIME_ENV = ROOT / "infra" / "ray" / "runtime_env.yaml"
_TRIES, _PAUSE_S = 5, 2.0
_AGENT_S, _NO_AGENT = 60.0, "No available agent"
_STOP_S = 20.0  # a pod that is deleted has half a minute


def run_job(run: Run, step: Callable[..., StepResult], inputs: Mapping[str, str | bool]) -> StepResult:
    """Do a step as `python -m components.<room>.job` in the cluster and wait for its end.

    A job that is under way with the same work, left by a caller that was killed, is followed rather than started twice; the same run
    and step with other settings or inputs is other work.

    Args:
        run: its workspace must be one that the cluster reaches; the settings travel in a file there.
        step: the function `step` of a `job.py`.
        inputs: its arguments.

    Raises:
        RankGRError: the error that the step raised in the cluster.
        ServiceError: the jobs API cannot be used, or the job failed without an error of ours.
    """
    name, room = name_of(step), step.__module__
    settings, options = run.config.to_json(), {**inputs, "fresh": run.fresh}
    work = storage.hash_json({"step": room, "settings": settings, "options": options})[:12]
    # A file of its own for each work: what was submitted before may not have read its settings yet.
    config_uri = storage.join(run.config.workspace, "runs", run.run_id, f"{name}.{work}.config.json")
    storage.write_bytes(config_uri, settings.encode())
    command = shlex.join(["python", "-m", room, "--config", config_uri, "--run-id", run.run_id, *_options(options)])
    job = Job.of(run.config.cluster, f"rankgr-{run.run_id}-{name}-{work}", command)
    with _stopped_with_us(job):
        succeeded = job.follow()
    if not succeeded:
        raise_kept_error(run.config.workspace, run.run_id, name)
        raise ServiceError(
            f"the Ray job failed: {job.message()}", where=f"{job.url}, job {job.id}", mend=f"ray job logs {job.id}; run again"
        )
    return run_records(run.config.workspace, run.run_id)[name]


def _options(values: Mapping[str, str | bool]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, str):
            yield from (f"--{name}", value)
        elif value or name != "fresh":
            yield f"--{'' if value else 'no-'}{name.replace('_', '-')}"


class Job:
    """A job of a cluster; `of` finds or submits it."""

    def __init__(self, client: Any, url: str, number: str) -> None:
        self.client, self.url, self.id = client, url, number
        self._shown = 0

    @staticmethod
    def of(cluster: ClusterConfig, name: str, command: str) -> Job:
        """The job of this name that has not ended, else a new one: `name-1`, or the number after the last one.

        A job of the same run and step with other work is stopped first: both might work in one folder.

        Raises:
            ServiceError: the jobs API does not answer, refuses the token, or refuses the job.
        """
        from ray.job_submission import JobSubmissionClient

        use_token()
        with _api_errors(cluster.jobs_url):
            client = JobSubmissionClient(cluster.jobs_url)
            of_step = f"{name.rpartition('-')[0]}-"
            jobs = {str(job.submission_id): job.status for job in client.list_jobs() if str(job.submission_id).startswith(of_step)}
            earlier = {number: status for number, status in jobs.items() if number.startswith(f"{name}-")}
            for number, status in jobs.items():
                if number not in earlier and not status.is_terminal():
                    get_logger("ray").warning("a job of this step with other settings is stopped", job=number)
                    Job(client, cluster.jobs_url, number).stop()
            for number, status in earlier.items():
                if not status.is_terminal():
                    get_logger("ray").info("a job that is under way is followed", job=number)
                    return Job(client, cluster.jobs_url, number)
            environment = runtime_env(upload=cluster.jobs_upload)
            job = {
                "entrypoint": command,
                "submission_id": f"{name}-{1 + max(map(_last_number, earlier), default=0)}",
                "runtime_env": environment,
            }
            number = _submitted(client, **job, entrypoint_num_cpus=cluster.job_cpus)
        get_logger("ray").info("job submitted", job=number, cluster=cluster.jobs_url)
        return Job(client, cluster.jobs_url, number)

    def follow(self) -> bool:
        """Pass on what the job writes until it ends; True where it succeeded. A connection that breaks is made again."""
        from aiohttp import ClientError

        tries = 0
        while True:
            before = self._shown
            try:
                asyncio.run(self._tail())
                status = self.client.get_job_status(self.id)
                if status.is_terminal():
                    return bool(status == "SUCCEEDED")
            except (RuntimeError, OSError, ClientError) as error:
                tries = 1 if self._shown > before else tries + 1
                if tries > _TRIES:
                    raise ServiceError(f"the logs of the job break off: {error}", where=self.url, mend=f"ray job logs {self.id}") from error
            time.sleep(_PAUSE_S)

    async def _tail(self) -> None:
        """Write what the log has beyond what was written of it already."""
        seen = 0
        async for text in self.client.tail_job_logs(self.id):
            sys.stderr.write(text[max(self._shown - seen, 0) :])
            sys.stderr.flush()
            seen += len(text)
            self._shown = max(self._shown, seen)

    def message(self) -> str:
        """How the job ended."""
        with _api_errors(self.url):
            return str(self.client.get_job_info(self.id).message or "no reason is given")

    def stop(self) -> None:
        """Have the cluster stop the job, and wait until it has: the next attempt works in the same folder."""
        deadline = time.monotonic() + _STOP_S
        with _api_errors(self.url):
            self.client.stop_job(self.id)
            while not self.client.get_job_status(self.id).is_terminal() and time.monotonic() < deadline:
                time.sleep(_PAUSE_S / 4)


def _last_number(submission_id: str) -> int:
    """The number behind the last dash; 0 for what is none."""
    text = submission_id.rpartition("-")[2]
    return int(text) if text.isdecimal() else 0


def _submitted(client: Any, **job: Any) -> str:
    """Submit a job; a cluster that has just started answers some seconds before it has a process that takes one."""
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if _NO_AGENT not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_S)


def runtime_env(*, upload: bool) -> dict[str, Any]:
    """The environment of `infra/ray/runtime_env.yaml`, with this code as the working directory if it is to be uploaded."""
    environment = dict(yaml.safe_load(RUNTIME_ENV.read_text("utf-8")))
    excludes = environment.pop("excludes")
    return {**environment, "working_dir": str(ROOT), "excludes": excludes} if upload else environment


def upload_bytes(folder: Path = ROOT) -> int:
    """Size of what `ray job submit --working-dir` uploads of a checkout."""
    from ray._private.runtime_env.packaging import create_package

    quiet_ray()
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        excludes = yaml.safe_load(RUNTIME_ENV.read_text("utf-8"))["excludes"]
        create_package(str(folder), package, include_gitignore=True, excludes=excludes)
        return package.stat().st_size


@contextmanager
def _stopped_with_us(job: Job) -> Iterator[None]:
    """Stop the job where this process is interrupted: Ctrl-C, or the SIGTERM of a pod that is deleted."""
    with signals_interrupt():
        try:
            yield
        except KeyboardInterrupt:
            get_logger("ray").warning("interrupted: the job is stopped", job=job.id)
            job.stop()
            raise


@contextmanager
def _api_errors(url: str) -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except (RuntimeError, OSError, ValueError, RayError) as error:  # those of `requests` are OSErrors
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServiceError(
            f"the jobs API of the Ray cluster cannot be used: {first}",
            where=url,
            mend="check cluster.jobs_url, that the cluster runs, and the RAY_AUTH_* variables",
        ) from error


if __name__ == "__main__":
    configure_logs()
    sys.stdout.write(f"{upload_bytes() / 1000:,.0f} kB are uploaded\n")
