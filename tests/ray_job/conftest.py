"""A Ray cluster as `ray start --head` makes it, with token authentication, and a fresh checkout to submit from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from infra.cluster import _ray_environment
from infra.local import LOOPBACK, free_port
from tests.command import ROOT, environment
from tests.logs import SETTINGS, write_log

RAY = [sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts"]
_START_S = 300.0
_TOKEN = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and what its clients need in their environment."""

    url: str
    environment: dict[str, str]
    checkout: Path
    settings: tuple[str, ...]
    """`--set` options for a small run whose workspace the cluster reaches."""

    def submit(self, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from the checkout, followed to its end."""
        given = ["--working-dir", ".", "--runtime-env", "infra/ray/runtime_env.yaml", "--entrypoint-num-cpus", "1"]
        command = [*RAY, "job", "submit", "--address", self.url, *given, "--", *entrypoint]
        return subprocess.run(command, cwd=self.checkout, env=self.environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows or would take, as a fresh clone has them."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def cluster(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` on free ports; the environment of this process has its token too."""
    folder, port, dashboard = tmp_path_factory.mktemp("raw"), free_port(), free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    own = {name: value for name, value in environment().items() if name != "PYTHONPATH"} | token
    own |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), own["PATH"]]),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
    }
    scratch = Path(tempfile.mkdtemp(prefix="rgr-job-", dir="/tmp"))
    where = [f"--port={port}", f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}"]
    # Its own too: beside another cluster of this machine, the process that takes jobs would find its usual port taken and not start.
    where.append(f"--dashboard-agent-listen-port={free_port()}")
    size = ["--num-cpus=4", "--num-gpus=0", f"--object-store-memory={128 << 20}", f"--temp-dir={scratch}/r", "--disable-usage-stats"]
    url = f"http://{LOOPBACK}:{dashboard}"
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(
            [*RAY, "start", "--head", "--block", *where, *size], cwd=folder, env=own, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_for_jobs_api(url, head, folder / "ray.log")
        events, items = write_log(folder)
        sources = [f"data.logs={events}", f"data.items={items}", f"workspace={folder / 'workspace'}"]
        settings = (*SETTINGS, *(part for setting in sources for part in ("--set", setting)))
        with _ray_environment(token):
            yield Cluster(url, own, checkout, settings)
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(scratch, ignore_errors=True)


def _wait_for_jobs_api(url: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        assert head.poll() is None, log.read_text()[-2000:]
        try:
            answer = httpx.post(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {_TOKEN}"}, json={"entrypoint": "true"}, timeout=30)
            if answer.is_success:  # it can be asked before it takes jobs
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)
