"""The whole application on a real Ray cluster and a real Valkey; only the model is a fake."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.precompute.job import Loader
from infra import storage
from infra.config import load_config
from infra.errors import ConfigError, ServiceError
from infra.local import port_is_free
from infra.slate_store import Slate, SlateStore
from serving.app import MODEL, LiveService, start
from serving.sync import Sync
from tests.fakes import fake_loader, item_id, write_bundle
from tests.serving import replicas


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
        assert client.get("/v1/users/ann/slate").json()["source"] == "stale"  # of 1970: served, and computed anew
        assert client.get("/v1/users/eve/slate").json()["source"] == "popular"
        assert source_of(client, "ann", "fresh")["model_version"] == "v1"

        events = [{"item_id": "item-03", "level": 3}, {"item_id": "unheard-of", "level": 3}]
        assert client.post("/v1/requests", json={"user_id": "eve", "events": events}).status_code == 202
        fresh = source_of(client, "eve", "fresh")
        assert [item["item_id"] for item in fresh["items"][:3]] == ["item-04", "item-05", "item-06"]
        assert fresh["items"][0]["title"] == "Title 4"
        assert [event["item_id"] for event in client.get("/v1/users/eve/history").json()["events"]] == ["item-03", "unheard-of"]
        assert client.get("/v1/users/ann/slate?k=6").status_code == 422

        port = int(url.rpartition(":")[2])
        taken = load_config(overrides=[f"serving.port={port}"])
        with pytest.raises(ServiceError, match=f"port {port} is taken"), start(taken, bundle, valkey):
            pass
    assert port_is_free("127.0.0.1", port)


@pytest.mark.usefixtures("ray_cluster")
def test_weights_are_swapped_while_requests_go_on(tmp_path: Path, valkey: str) -> None:
    config = load_config(overrides=["serving.port=0", "decoding.slate_size=5"])
    uris, versions = [], []
    for name in ("one", "two"):
        uris.append(write_bundle(tmp_path / name))
        storage.write_bytes(f"{uris[-1]}/weights", name.encode())
        versions.append(storage.commit(uris[-1], {}).digest[:12])
    loader = loader_of(dict(zip(uris, versions, strict=True)))
    with SlateStore(valkey) as store:
        store.complete(versions[0], users=store.publish(versions[0], [Slate("ann", (item_id(0),), (1.0,), versions[0], 1)]))
        store.activate(versions[0])
        with start(config, uris[0], valkey, version=versions[0], loader=loader) as url, httpx.Client(base_url=url, timeout=10) as client:
            before = replicas(MODEL)
            assert before
            sync = Sync(
                LiveService(config, valkey, loader=loader), store, lambda: uris[1], bundle_uri=uris[0], version=versions[0], slate_size=5
            )
            seen, done = [], threading.Event()

            def read() -> None:
                with httpx.Client(base_url=url, timeout=10) as other:
                    while not done.is_set():
                        answer = other.get("/v1/users/ann/slate")
                        seen.append((answer.status_code, answer.json().get("model_version")))

            with ThreadPoolExecutor(1) as pool:
                reading = pool.submit(read)
                try:
                    assert sync.once()
                finally:
                    done.set()
                reading.result()  # raises what went wrong there
            assert replicas(MODEL) == before  # in place
            assert {status for status, _ in seen} == {200}
            assert [version for _, version in seen] == sorted((version for _, version in seen), key=versions.index)
            assert client.get("/v1/users/ann/slate").json()["model_version"] == versions[1]
            assert client.post("/v1/requests", json={"user_id": "eve"}).json()["model_version"] == versions[1]
            assert source_of(client, "eve", "fresh")["model_version"] == versions[1]


def source_of(client: httpx.Client, user: str, source: str) -> dict[str, Any]:
    """A user's slate, once it has a source."""
    deadline = time.monotonic() + 30
    while (slate := dict(client.get(f"/v1/users/{user}/slate").json()))["source"] != source:
        assert time.monotonic() < deadline, f"the {source} slate never came"
        time.sleep(0.02)
    return slate


def loader_of(versions: dict[str, str]) -> Loader:
    loaders = {uri: fake_loader(version) for uri, version in versions.items()}
    return lambda uri: loaders[uri](uri)


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
