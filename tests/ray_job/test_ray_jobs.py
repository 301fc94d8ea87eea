"""`ray job submit` from a fresh checkout, step by step, and a Kubeflow step that submits its work: with tokens, on a real cluster."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from components.evaluation import job as evaluation
from infra.cluster import _ray_environment
from infra.config import Config, load_config
from infra.errors import IntegrityError, ServiceError
from infra.kfp_run import on_ray
from infra.ray_jobs import Job, upload_bytes
from infra.steps import Run, run_records
from tests.command import ROOT
from tests.ray_job.conftest import Cluster

TRAINING = ("--set", "training.epochs=12", "--set", "training.checkpoint_every_epochs=1")
MOST_BYTES = 3_000_000
_STEP = """
from components.training.component import train_retriever
from kfp import dsl
import sys
print(train_retriever.python_func(sys.argv[1], sys.argv[2], False, sys.argv[3], sys.argv[4], metrics=dsl.Metrics()))
"""


def inputs_of(job: Path) -> list[str]:
    """Options that a step wants: the names in the call of `job_main` at the end of its file."""
    calls = [
        node for node in ast.walk(ast.parse(job.read_text())) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "job_main"
    ]
    return list(ast.literal_eval(calls[-1].args[1]))


@dataclass
class Walk:
    """What has been submitted, and where its outputs lie."""

    cluster: Cluster
    config: Config
    uris: dict[str, str]
    outputs: dict[str, subprocess.CompletedProcess[str]]
    cancelled: subprocess.CompletedProcess[str] | None = None

    def submit(self, room: str) -> None:
        wanted = inputs_of(ROOT / f"components/{room}/job.py")
        given = [part for name in wanted for part in (f"--{name}", self.uris[name])]
        command = ("python", "-m", f"components.{room}.job", "--preset", "tiny", "--run-id", "jobs", *self.cluster.settings, *TRAINING)
        self.outputs[room] = self.cluster.submit(*command, *given)
        self.uris |= {name: result.uri for name, result in run_records(self.config.workspace, "jobs").items()}


@pytest.fixture(scope="module")
def walk(cluster: Cluster, valkey_server: str) -> Walk:
    """Every `components/*/job.py` once, each as soon as what it needs is there; training is cancelled first and goes on."""
    cluster = Cluster(cluster.url, cluster.environment, cluster.checkout, (*cluster.settings, "--set", f"slate_store.url={valkey_server}"))
    overrides = [text for text in (*cluster.settings, *TRAINING) if text != "--set"]
    walked = Walk(cluster, load_config(preset="tiny", overrides=overrides), {}, {})
    pending = {path.parent.name: inputs_of(path) for path in sorted(ROOT.glob("components/*/job.py"))}
    while pending:
        room = next((name for name, wanted in pending.items() if set(wanted) <= set(walked.uris)), None)
        if room is None:
            break
        del pending[room]
        if room == "training":
            walked.cancelled = cancel_a_kubeflow_step(walked)
        walked.submit(room)
    assert not pending, {name: run.stdout[-2000:] + run.stderr[-1000:] for name, run in walked.outputs.items() if run.returncode}
    return walked


def cancel_a_kubeflow_step(walk: Walk) -> subprocess.CompletedProcess[str]:
    """Start the component `training` with a cluster for its work, and end it with SIGTERM once there is a checkpoint."""
    config = walk.config.model_copy(update={"cluster": walk.config.cluster.model_copy(update={"jobs_url": walk.cluster.url})})
    arguments = [config.to_json(), "jobs", walk.uris["sessions"], walk.uris["semantic_ids"]]
    own = walk.cluster.environment | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", _STEP, *arguments]
    step = subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    checkpoints = Path(config.workspace) / "steps/training"
    while not list(checkpoints.glob("*/checkpoints/checkpoint_manager_snapshot.json")):
        assert step.poll() is None, step.communicate()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)
    os.kill(step.pid, signal.SIGTERM)
    out, err = step.communicate(timeout=60)
    return subprocess.CompletedProcess(command, step.returncode, out, err)


def test_every_step_runs_as_a_submitted_job(walk: Walk) -> None:
    failed = {room: done.stdout[-2000:] + done.stderr[-2000:] for room, done in walk.outputs.items() if done.returncode}
    assert not failed, "\n".join(failed.values())
    assert {"sessions", "semantic_ids", "training", "evaluation", "release", "precompute"} <= set(walk.outputs)


def test_the_log_of_a_job_is_followed(walk: Walk) -> None:
    assert "finished" in walk.outputs["sessions"].stdout
    assert walk.uris["sessions"] in walk.outputs["sessions"].stdout


def test_a_kubeflow_step_that_is_cancelled_stops_its_job(walk: Walk) -> None:
    assert walk.cancelled is not None
    assert walk.cancelled.returncode != 0
    assert "the job is stopped" in walk.cancelled.stderr
    jobs = JobSubmissionClient(walk.cluster.url).list_jobs()
    assert [job.status for job in jobs if str(job.submission_id).startswith("rankgr-jobs-training-")] == [JobStatus.STOPPED]


def test_training_goes_on_from_the_checkpoint_of_the_job_that_was_stopped(walk: Walk) -> None:
    assert "an interrupted run is continued from its last checkpoint" in walk.outputs["training"].stdout


def test_a_job_that_fails_ends_the_command_with_the_error_and_not_with_zero(cluster: Cluster) -> None:
    done = cluster.submit("python", "-m", "components.sessions.job", *cluster.settings, "--set", "data.logs=/nowhere.csv")
    assert done.returncode != 0
    assert "where: /nowhere.csv" in done.stdout


def with_jobs(walk: Walk, *overrides: str, run_id: str = "kfp") -> Run:
    settings = [text for text in (*walk.cluster.settings, *TRAINING) if text != "--set"]
    return Run(load_config(preset="tiny", overrides=[*settings, f"cluster.jobs_url={walk.cluster.url}", *overrides]), run_id)


def test_a_kubeflow_step_gets_the_result_of_its_job_and_shows_its_log(walk: Walk, capfd: pytest.CaptureFixture[str]) -> None:
    made = {name: walk.uris[name] for name in ("sessions", "semantic_ids", "training")}
    result = on_ray(with_jobs(walk), evaluation.step, **made)
    assert result.uri == walk.uris["evaluation"]
    assert "skipped: finished before" in capfd.readouterr().err


def test_a_kubeflow_step_raises_the_error_of_its_job_as_what_it_was(walk: Walk) -> None:
    made = {name: walk.uris[name] for name in ("sessions", "semantic_ids")}
    with pytest.raises(IntegrityError, match="never committed") as caught:
        on_ray(with_jobs(walk, run_id="wrong"), evaluation.step, **made, training="/nowhere")
    assert caught.value.where == "/nowhere"


def test_a_cluster_that_refuses_the_token_is_told(walk: Walk) -> None:
    wrong = {"RAY_AUTH_TOKEN": "f" * 64}
    with _ray_environment(wrong), pytest.raises(ServiceError, match="the jobs API of the Ray cluster cannot be used") as caught:
        Job.of(with_jobs(walk).config.cluster, "name", "true")
    assert "RAY_AUTH" in caught.value.mend


def test_the_upload_is_small(checkout: Path) -> None:
    assert upload_bytes(checkout) < MOST_BYTES
