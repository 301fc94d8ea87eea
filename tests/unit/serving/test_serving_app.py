"""The whole application on a real Ray cluster and a real Valkey; only the model is a fake."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import httpx
import pytest

from infra.config import load_config
from infra.errors import ConfigError, ServiceError
from infra.local import port_is_free
from infra.slate_store import Slate, SlateStore
from serving.app import start
from tests.fakes import fake_loader, item_id, write_bundle


@pytest.mark.usefixtures("ray_cluster")
def test_from_the_first_request_to_a_fresh_slate(tmp_path: Path, valkey: str) -> None:
    config = load_config(overrides=["serving.port=0", "decoding.slate_size=5"])
    bundle = write_bundle(tmp_path)
    with SlateStore(valkey) as store:
        store.publish("v1", [Slate("ann", (item_id(0),), (1.0,), "v1", 1)])
        store.complete("v1", users=1)
        store.activate("v1")

    with start(config, bundle, valkey, version="v1", loader=fake_loader("v1")) as url, httpx.Client(base_url=url, timeout=10) as client:
        assert url.startswith("http://127.0.0.1:")
        assert client.get("/readyz").json()["model_version"] == "v1"
        assert client.get("/v1/users/ann/slate").json()["source"] == "slate"
        assert client.get("/v1/users/eve/slate").json()["source"] == "fallback"

        events = [{"item_id": "item-03", "level": 3}, {"item_id": "unheard-of", "level": 3}]
        assert client.post("/v1/requests", json={"user_id": "eve", "events": events}).status_code == 202
        deadline = time.monotonic() + 30
        while (fresh := client.get("/v1/users/eve/slate", params={"k": 3}).json())["source"] != "fresh":
            assert time.monotonic() < deadline, "the fresh slate never came"
        assert [item["item_id"] for item in fresh["items"]] == ["item-04", "item-05", "item-06"]
        assert fresh["items"][0]["title"] == "Title 4"
        assert [event["item_id"] for event in client.get("/v1/users/eve/history").json()["events"]] == ["item-03", "unheard-of"]
        assert client.get("/v1/users/ann/slate?k=6").status_code == 422

        port = int(url.rpartition(":")[2])
        taken = load_config(overrides=[f"serving.port={port}"])
        with pytest.raises(ServiceError, match=f"port {port} is taken"), start(taken, bundle, valkey):
            pass
    assert port_is_free("127.0.0.1", port)


def test_other_machines_are_kept_out_without_a_token(valkey: str) -> None:
    config = load_config(overrides=["serving.host=0.0.0.0"])
    with pytest.raises(ConfigError, match="opens the service to other machines"), start(config, None, valkey):
        pass


def test_a_taken_port_is_named_before_ray_is_asked(valkey: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = load_config(overrides=[f"serving.port={port}"])
        with pytest.raises(ServiceError, match=f"port {port} is taken"), start(config, None, valkey):
            pass
