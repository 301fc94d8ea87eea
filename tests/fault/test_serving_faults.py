"""A running service whose processes are killed, whose bundles are damaged, which is asked for too much: it goes on answering."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from components.retriever.bundle import verified_version
from infra import storage
from infra.config import load_config
from infra.errors import IntegrityError, ServiceError
from infra.local import valkey as run_valkey
from infra.slate_store import Slate, SlateStore
from infra.tracking import Registry
from pipelines.cli import serve as command
from serving.app import LiveService, start
from serving.sync import Sync
from tests.command import ROOT, environment
from tests.serving import (
    SLATE_SIZE,
    TOKEN,
    USERS,
    DurableValkey,
    Served,
    load_without_torch,
    more,
    replicas,
    wait_for,
    write_small_bundle,
)
from tests.unit.components.training.small import configuration, timelines

SETTINGS = (
    "serving.port=0",
    "serving.tokens=[env:RANKGR_TEST_TOKEN]",
    "serving.retrieval_replicas=2",
    "serving.precompute_max_replicas=1",
    "serving.max_pending=8",
    "serving.deadline_s=60",
    "serving.batch_wait_ms=500",
    f"decoding.slate_size={SLATE_SIZE}",
    "decoding.users_per_batch=32",
)
MAX_PENDING, INGRESSES = 8, 2
OUTAGE_S = 10.0


@pytest.fixture(scope="module")
def service(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    config = configuration(*SETTINGS)
    bundle = write_small_bundle(folder, config)
    version = storage.open_committed(bundle).digest[:12]
    with pytest.MonkeyPatch.context() as patch, run_valkey(folder / "valkey") as valkey_url:
        patch.setenv("RANKGR_TEST_TOKEN", TOKEN)
        store = DurableValkey(valkey_url)
        try:
            with start(config, bundle, valkey_url, version=version, loader=load_without_torch) as url:
                yield Served(url, config, bundle, version, store)
        finally:
            store.end()


@pytest.fixture
def served(service: Served) -> Served:
    """The service, with slates of all users and nothing else in its store."""
    with redis.Redis.from_url(service.valkey.url) as client:
        client.flushall()
    service.publish()
    return service


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


def test_replicas_killed_under_load_fail_no_request(served: Served, client: httpx.Client) -> None:
    kept: list[str] = []

    def write(done: threading.Event) -> None:
        while not done.is_set():
            answer = client.post("/v1/events", json={"events": [{"user_id": "u1", "item_id": "i1"}]})
            assert answer.status_code == 202, answer.text
            kept.extend(answer.json()["event_ids"])

    done = threading.Event()
    with served.load() as seen, ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write, done)
        try:
            more(seen, 50)
            before = {deployment: replicas(deployment) for deployment in ("Ingress", "Precompute")}
            os.kill(min(before["Ingress"]), signal.SIGKILL)
            more(seen, 50)
            os.kill(min(before["Precompute"]), signal.SIGKILL)
            with served.client() as other:  # the trigger waits for the next replica
                assert served.fresh_slate(other, "u2")["model_version"] == served.version
            for deployment, pids in before.items():
                wait_for(lambda d=deployment, p=pids: len(replicas(d)) == len(p) and replicas(d) != p, f"another {deployment}")
            more(seen, 50)
        finally:
            done.set()
        writing.result()
    assert Counter(status for status, *_ in seen) == {200: len(seen)}
    assert {version for *_, version in seen} == {served.version}
    with redis.Redis.from_url(served.valkey.url) as store:
        events = [json.loads(fields[b"event"]) for _, fields in store.xrange("rankgr:events")]
    assert {event["event_id"] for event in events if event["user_id"] == "u1"} == set(kept)


def test_while_redis_is_dead_readers_get_the_fallback_and_afterwards_every_acknowledged_slate(served: Served, client: httpx.Client) -> None:
    fresh = served.fresh_slate(client, "u3")
    acknowledged: list[str] = []

    def publish() -> None:
        with SlateStore.of(served.config.slate_store, served.valkey.url) as store:
            for number in range(1_000_000):
                store.put_one(Slate(f"late-{number}", ("i1",), (1.0,), served.version, fresh["computed_at"]))
                acknowledged.append(f"late-{number}")

    with served.load() as seen, ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(publish)
        more(seen, 20)
        wait_for(lambda: len(acknowledged) > 20, "acknowledged slates")
        served.valkey.kill()
        wait_for(lambda: seen[-1][1] == "fallback", "the fallback")
        more(seen, 10)  # what was on its way has arrived
        begin, until = len(seen), time.monotonic() + OUTAGE_S
        wait_for(lambda: time.monotonic() > until, "the end of the outage")
        refused = client.post("/v1/events", json={"events": [{"user_id": "u1", "item_id": "i1"}]})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        end = len(seen)
        with pytest.raises(ServiceError):
            publishing.result()
        served.valkey.start_again()
        wait_for(lambda: seen[-1][1] in ("stored", "fresh"), "slates again")
    assert Counter(status for status, *_ in seen) == {200: len(seen)}
    assert end > begin
    assert {source for _, source, _ in seen[begin:end]} == {"fallback"}
    with SlateStore.of(served.config.slate_store, served.valkey.url) as store:
        assert store.get_many([*acknowledged, *USERS]).keys() == {*acknowledged, *USERS}
    # Each ingress replica finds Redis again by itself, one a moment later than the other.
    again = wait_for(lambda: _if_from_the_store(client.get("/v1/users/u3/slate").json()), "the slate of u3")
    assert (again["items"], again["computed_at"]) == (fresh["items"], fresh["computed_at"])


def _if_from_the_store(slate: dict[str, Any]) -> dict[str, Any] | None:
    return None if slate["source"] == "fallback" else slate


BULK = """
import sys
from pathlib import Path
from components.precompute.job import precompute
from infra.cluster import ray_session
from infra.config import Config
from tests.serving import Gated
config_json, bundle, timelines, url, version, gate = sys.argv[1:]
config = Config.from_json(config_json)
with ray_session(config.cluster):
    precompute(config, bundle, timelines, url, version, loader=Gated(Path(gate)))
"""


def test_of_a_bulk_job_killed_halfway_readers_see_nothing(served: Served, tmp_path: Path) -> None:
    other = write_small_bundle(tmp_path, configuration(*SETTINGS, "seed=1"))
    version = storage.open_committed(other).digest[:12]
    assert version != served.version
    storage.write_table(timelines(), str(tmp_path / "timelines" / "part-00000.parquet"))
    config = configuration(*SETTINGS, "decoding.users_per_batch=4", "serving.precompute_actors=1")
    job = [config.to_json(), other, str(tmp_path / "timelines"), served.valkey.url, version, str(tmp_path / "gate")]
    variables = environment() | {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    with served.load() as seen, SlateStore.of(config.slate_store, served.valkey.url) as store:
        process = subprocess.Popen([sys.executable, "-c", BULK, *job], env=variables, cwd=ROOT)
        try:
            wait_for(lambda: store.count(version), "the first slates of the bulk job")
        finally:
            process.kill()
            process.wait()
        assert 0 < store.count(version) < len(USERS)
        more(seen, 20)
        assert (store.active_version(), store.users(version)) == (served.version, None)
        assert {version for *_, version in seen} == {served.version}
    assert Counter(status for status, *_ in seen) == {200: len(seen)}


def _flip_a_byte(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last[0] ^ 1]))


def _commit_again(folder: Path, **metadata: Any) -> None:
    """With hashes that fit what is there now."""
    before = storage.read_manifest(str(folder))
    assert before is not None
    (folder / storage.MANIFEST).unlink()
    storage.commit(str(folder), {**before.metadata, **metadata})


def _swap_the_sid_hash(folder: Path) -> None:
    _commit_again(folder, sid_hash="0" * 64)


def _pickle_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))
    _commit_again(folder)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (_flip_a_byte, "sha256.*"),
        (_swap_the_sid_hash, "the SID table is not the one that the bundle was made with"),
        (_pickle_the_weights, "not a safetensors file"),
    ],
)
def test_a_bundle_that_is_not_whole_is_refused_by_name_and_the_old_one_serves(
    served: Served, client: httpx.Client, tmp_path: Path, damage: Any, name: str
) -> None:
    bad = write_small_bundle(tmp_path, configuration(*SETTINGS, "seed=1"))
    version = storage.open_committed(bad).digest[:12]
    damage(Path(bad))
    live = LiveService(served.config, served.valkey.url, loader=load_without_torch)
    known = {"bundle_uri": served.bundle_uri, "version": served.version}

    with SlateStore.of(served.config.slate_store, served.valkey.url) as store:
        sync = Sync(live, store, lambda: bad, **known, slate_size=SLATE_SIZE, verify=verified_version)
        with pytest.raises(IntegrityError, match=name):
            sync.once()
        assert store.versions() == [served.version]

    registry = Registry(load_config().tracking, str(tmp_path))
    registry.promote(registry.register(bad, evaluation="", metrics={}, params={}, files={}))
    with pytest.raises(IntegrityError, match=name):
        command.serve(overrides=[f"workspace={tmp_path}"])

    # Damaged after it was verified: replicas do not take it either.
    before = replicas("Precompute")
    live.hold({served.bundle_uri: served.version, bad: version})
    try:
        assert served.fresh_slate(client, "u4")["model_version"] == served.version
        assert replicas("Precompute") == before
    finally:
        live.hold({served.bundle_uri: served.version})


def test_with_twelve_times_too_many_triggers_user_reads_succeed_and_refusals_are_declared(served: Served) -> None:
    triggers: Counter[tuple[int, bool]] = Counter()
    reads: Counter[int] = Counter()

    async def story() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, headers=served.headers, timeout=60, limits=limits) as client:
            done = asyncio.Event()

            async def trigger(number: int) -> None:
                for turn in range(2):
                    answer = await client.post("/v1/requests", json={"user_id": f"busy-{number}-{turn}"})
                    triggers[answer.status_code, answer.headers.get("Retry-After", "").isdigit()] += 1

            async def read(number: int) -> None:
                while not done.is_set():
                    reads[(await client.get(f"/v1/users/{USERS[number]}/slate")).status_code] += 1

            reading = [asyncio.create_task(read(number)) for number in range(4)]
            await asyncio.gather(*map(trigger, range(12 * MAX_PENDING * INGRESSES)))
            done.set()
            await asyncio.gather(*reading)

    asyncio.run(story())
    assert set(triggers) <= {(202, False), (429, True), (503, True)}
    assert triggers[429, True] > 0 < triggers[202, False]
    assert reads[200] >= 0.99 * reads.total() > 0
    assert set(reads) <= {200, 503}


def test_no_answer_is_one_that_the_api_does_not_declare(served: Served, tmp_path: Path) -> None:
    arguments = ["--max-examples=12", "--seed=1", "--generation-database=none", "--header", f"Authorization: Bearer {TOKEN}"]
    # A time that fits the schema may be too long ago, which no schema can say.
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", "--exclude-checks=positive_data_acceptance", *arguments]
    ran = subprocess.run([*command, f"{served.url}/openapi.json"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]


def test_without_a_valid_token_every_route_that_changes_something_answers_401(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        paths = client.get("/openapi.json").json()["paths"]
        mutating = [(method, re.sub(r"{\w+}", "x", path)) for path, methods in paths.items() for method in methods if method != "get"]
        assert {"/v1/events", "/v1/requests", "/v1/slates:batch"} <= {path for _, path in mutating}
        for method, path in mutating:
            for given in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Bearer {TOKEN}x"},
                {"Authorization": f"Basic {TOKEN}"},
            ):
                refused = client.request(method, path, headers=given, json={"user_id": "u1"})
                assert refused.status_code == 401, (method, path, given)
        assert client.get("/v1/users/u1/slate").status_code == 200
    with redis.Redis.from_url(served.valkey.url) as store:
        assert not store.exists("rankgr:events")
