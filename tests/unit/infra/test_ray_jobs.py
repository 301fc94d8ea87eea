"""Which job of a cluster does a step's work: the same work is followed, other work is another job."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from infra import storage
from infra.config import Config, load_config
from infra.errors import DataError, IntegrityError
from infra.ray_jobs import run_job
from infra.steps import Run, StepResult, keep_error, remember

STEP = "counting"


def step(run: Run, *, source: str, strict: bool = True) -> StepResult:
    """What the cluster would do; here it is only named."""
    raise AssertionError((run, source, strict))


@dataclass(frozen=True)
class Submitted:
    submission_id: str
    entrypoint: str
    status: JobStatus


@dataclass
class Cluster:
    """A jobs API whose jobs are listed with one status and succeed once they are followed."""

    run: Run
    listed: JobStatus = JobStatus.RUNNING
    jobs: list[Submitted] = field(default_factory=list)
    followed: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def list_jobs(self) -> list[Submitted]:
        return self.jobs

    def submit_job(self, *, submission_id: str, entrypoint: str, **_: Any) -> str:
        self.jobs.append(Submitted(submission_id, entrypoint, self.listed))
        remember(self.run, StepResult(STEP, "/where/it/lies", False, 0.1))
        return submission_id

    async def tail_job_logs(self, number: str) -> AsyncIterator[str]:
        self.followed.append(number)
        yield ""

    def stop_job(self, number: str) -> None:
        self.stopped.append(number)

    def get_job_status(self, number: str) -> JobStatus:
        return JobStatus.SUCCEEDED


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(load_config(overrides=[f"workspace={tmp_path}", "cluster.jobs_url=http://head:8265", "cluster.jobs_upload=false"]), "r1")


@pytest.fixture
def cluster(run: Run, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster(run)
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda url: cluster)
    return cluster


def test_the_same_work_under_way_is_followed_rather_than_done_twice(cluster: Cluster, run: Run) -> None:
    results = [run_job(run, step, {"source": "s3://in", "strict": True}) for _ in range(2)]
    (job,) = cluster.jobs
    assert cluster.followed == [job.submission_id] * 2
    assert job.submission_id.startswith("rankgr-r1-counting-")
    assert [result.uri for result in results] == ["/where/it/lies"] * 2


@pytest.mark.parametrize("change", ["settings", "input", "flag", "fresh"])
def test_a_run_id_that_is_used_again_for_other_work_has_a_job_of_its_own(cluster: Cluster, run: Run, change: str) -> None:
    inputs = {"source": "s3://in", "strict": True}
    other, others = run, dict(inputs)
    if change == "settings":
        other = replace(run, config=run.config.model_copy(update={"seed": run.config.seed + 1}))
    elif change == "fresh":
        other = replace(run, fresh=True)
    else:
        others |= {"source": "s3://other"} if change == "input" else {"strict": False}
    run_job(run, step, inputs)
    run_job(other, step, others)
    first, second = cluster.jobs
    assert cluster.followed == [first.submission_id, second.submission_id]
    assert len({first.submission_id, second.submission_id}) == 2
    assert cluster.stopped == [first.submission_id]  # both might work in one folder
    assert settings_of(first) == run.config
    assert settings_of(second) == other.config


def settings_of(job: Submitted) -> Config:
    """What a job reads when it starts, which may be after another was submitted."""
    words = shlex.split(job.entrypoint)
    return Config.from_json(storage.read_bytes(words[words.index("--config") + 1]).decode())


def test_work_whose_job_has_ended_is_submitted_again_under_the_next_number(cluster: Cluster, run: Run) -> None:
    cluster.listed = JobStatus.STOPPED
    for _ in range(3):
        run_job(run, step, {"source": "s3://in"})
    work = cluster.jobs[0].submission_id.removesuffix("-1")
    assert cluster.followed == [f"{work}-1", f"{work}-2", f"{work}-3"]


def test_a_job_that_fails_raises_its_own_error_and_not_that_of_a_step_beside_it(
    cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "get_job_status", lambda number: JobStatus.FAILED)
    keep_error(run, "reward", DataError("no positives"))
    keep_error(run, STEP, IntegrityError("damaged"))
    with pytest.raises(IntegrityError, match=r"^damaged$"):
        run_job(run, step, {"source": "s3://in"})
