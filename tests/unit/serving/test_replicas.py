"""Two ingress replicas and a model replica on a real Ray cluster: whoever is asked speaks for all, and a request keeps its name."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra import storage
from infra.config import load_config
from infra.slate_store import Slate, SlateStore
from serving.app import APP, LiveService, start
from tests.fakes import fake_loader, item_id, write_bundle
from tests.serving import replicas, wait_for

PREFIX = "replicas"


@pytest.fixture(scope="module")
def service(ray_cluster: str, valkey_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    bundle = write_bundle(tmp_path_factory.mktemp("bundle"))
    config = load_config(
        overrides=["serving.port=0", "serving.retrieval_replicas=2", "decoding.slate_size=5", f"slate_store.prefix={PREFIX}"]
    )
    with SlateStore(valkey_server, prefix=PREFIX) as store:
        store.publish("v1", [Slate("ann", (item_id(0),), (1.0,), "v1", time.time_ns() // 1_000_000)])
        store.complete("v1", users=1)
        store.activate("v1")
    with start(config, bundle, valkey_server, version="v1", loader=fake_loader("v1")) as url:
        yield url


def samples(url: str, name: str, **labels: str) -> dict[str, float]:
    """Value of a metric at each replica."""
    text = httpx.get(f"{url}/metrics", timeout=10).text
    found = (sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name)
    return {s.labels["replica"]: s.value for s in found if labels.items() <= s.labels.items()}


def test_whichever_replica_is_asked_the_figures_are_of_all(service: str) -> None:
    asked = 0

    def both_answered() -> dict[str, float]:
        nonlocal asked
        httpx.get(f"{service}/v1/users/ann/slate", timeout=10)  # a connection each, so that both are chosen
        asked += 1
        by_replica = samples(service, "ray_rankgr_slates_total", source="stored")
        return by_replica if len([n for n in by_replica.values() if n > 0]) == 2 else {}

    def answers() -> Counter[tuple[int, int]]:
        stats = [httpx.get(f"{service}/v1/stats", timeout=10).json() for _ in range(12)]
        return Counter((one["replicas"], one["by_source"]["stored"]) for one in stats)

    names = set(wait_for(both_answered, "an answer of both replicas"))
    assert {name.partition("#")[0] for name in names} == {"Ingress"}
    for _ in range(20):
        httpx.get(f"{service}/v1/users/ann/slate", timeout=10)
    # Reports of other replicas are kept for a second.
    wait_for(lambda: answers() == {(2, asked + 20): 12}, "the counts of all replicas, whichever is asked")
    loaded = samples(service, "ray_rankgr_model_loaded", version="v1")
    assert [(name.partition("#")[0], value) for name, value in loaded.items()] == [("Precompute", 1.0)]
    assert samples(service, "ray_rankgr_swaps_total", outcome="refused").popitem()[1] == 0


def test_a_request_keeps_its_name_in_the_logs_of_ingress_and_model(service: str) -> None:
    answer = httpx.post(f"{service}/v1/requests", json={"user_id": "eve"}, headers={"X-Request-ID": "from-the-shop-7"}, timeout=10)
    assert (answer.status_code, answer.headers["X-Request-ID"]) == (202, "from-the-shop-7")
    for deployment, line in (("Ingress", "fresh slate"), ("Precompute", "slates computed")):
        found = wait_for(lambda d=deployment: [t for t in lines_of(d) if "from-the-shop-7" in t], f"a line of {deployment}")
        assert any(line in text for text in found)


def lines_of(deployment: str) -> list[str]:
    """What the replicas of a deployment wrote to standard error."""
    lines = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):
            if f"{APP}:{deployment}" in " ".join(process.cmdline()[:1]):
                lines += Path(os.readlink(f"/proc/{process.pid}/fd/2")).read_text(errors="replace").splitlines()
    return lines


def test_all_replicas_are_told_in_place_which_bundle_is_shown(service: str, valkey_server: str, tmp_path: Path) -> None:
    def status_of(item: str) -> set[int]:
        return {httpx.get(f"{service}/v1/items/{item}", timeout=10).status_code for _ in range(12)}  # a connection each

    old_only, new_only, before = item_id(0), "new-item", replicas("Ingress")
    uri = f"{write_bundle(tmp_path)}/catalogue.parquet"
    items = storage.read_table(uri)
    storage.write_table(items.set_column(1, "item_id", [[new_only, *items["item_id"].to_pylist()[1:]]]), uri)
    assert (status_of(old_only), status_of(new_only)) == ({200}, {404})
    with closing(LiveService(load_config(), valkey_server)) as live:
        live.show(str(tmp_path), "v2")
        assert (status_of(old_only), status_of(new_only)) == ({404}, {200})
        live.show(str(tmp_path / "damaged"), "v3")
        assert status_of(new_only) == {200}
    assert replicas("Ingress") == before
