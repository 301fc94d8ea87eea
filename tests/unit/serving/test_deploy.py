"""The file for `serve deploy`: deployed for real on a Ray cluster, by Ray's own command."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from infra import storage
from infra.config import Config, load_config
from infra.errors import ConfigError
from infra.local import free_port
from infra.slate_store import Slate, SlateStore
from serving.app import APP
from serving.deploy import build, serve_file
from tests.streaming import settings, write_small_bundle


@pytest.mark.usefixtures("ray_cluster")
def test_ray_deploys_the_file_and_serves_another_bundle_when_it_changes(tmp_path: Path, valkey: str) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    config = load_config(overrides=[f"serving.port={free_port()}", f"slate_store.url={valkey}"])
    bundles = [write_small_bundle(tmp_path / name, settings(f"seed={seed}")) for seed, name in enumerate(("one", "two"))]
    file = tmp_path / "serve.yaml"
    file.write_text(serve_file(config, bundles[0]), "utf-8")
    command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", str(file)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with httpx.Client(base_url=f"http://127.0.0.1:{config.serving.port}", timeout=10) as client:
            wait_until_shown(client, version(bundles[0]))
            until(lambda: serve.status().applications[APP].status == "RUNNING", "the model replica never came")
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate(yaml.safe_load(serve_file(config, bundles[1]))))
            wait_until_shown(client, version(bundles[1]))
            with SlateStore(valkey) as store:
                store.publish(version(bundles[1]), [Slate("ann", ("i1",), (1.0,), version(bundles[1]), 1)])
                store.complete(version(bundles[1]), users=1)
                store.activate(version(bundles[1]))
            assert client.post("/v1/requests", json={"user_id": "ann"}).status_code == 202
            until(lambda: client.get("/v1/users/ann/slate").json()["source"] == "fresh", "the fresh slate never came")
    finally:
        serve.shutdown()


def version(bundle: str) -> str:
    return storage.open_committed(bundle).digest[:12]


def wait_until_shown(client: httpx.Client, wanted: str) -> None:
    """Until a bundle's popular items are shown."""

    def is_shown() -> bool:
        try:
            return bool(client.get("/v1/users/eve/slate").json()["model_version"] == wanted)
        except (httpx.TransportError, ValueError):
            return False  # it is still starting

    until(is_shown, f"{wanted} was never shown")


def until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


@pytest.mark.parametrize("url", ["redis://:hidden@host:1/0", "redis://host:1/0?password=hidden"])
def test_secrets_stay_out_of_the_file(url: str, tmp_path: Path) -> None:
    written = yaml.safe_load(serve_file(load_config(overrides=[f"slate_store.url={url}"]), str(tmp_path)))
    assert "hidden" not in str(written)
    assert written["applications"][0]["args"]["redis_url"] == ""


def test_what_is_wrong_with_the_arguments_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKGR_REDIS_URL", raising=False)
    with pytest.raises(ConfigError, match="bundel"):
        build({"bundel": "x"})
    with pytest.raises(ConfigError, match="no Redis is named"):
        build({"bundle": str(tmp_path)})
    with pytest.raises(ConfigError, match="prot"):
        build({"bundle": str(tmp_path), "redis_url": "redis://127.0.0.1:1/0", "settings": {"serving": {"prot": 1}}})


def test_an_open_service_without_a_token_is_not_written(tmp_path: Path) -> None:
    open_to_all: Config = load_config(overrides=["serving.host=0.0.0.0"])
    with pytest.raises(ConfigError, match="opens the service to other machines"):
        serve_file(open_to_all, str(tmp_path))
