"""A running service for tests that break it: ingress and model replicas, bundles, a Valkey that can be killed."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import redis
from safetensors.numpy import save

from components.retriever.bundle import verified_version, write_bundle
from components.retriever.contract import History, Ranked
from components.semantic_ids.coder import FILES as CODER_FILES
from components.semantic_ids.table import codes_of
from infra import records, storage
from infra.config import Config
from infra.slate_store import Slate, SlateStore
from serving.app import APP
from tests.unit.components.training.small import N_ITEMS, sids

TOKEN = "a-token-of-the-tests-0123456789"  # noqa: S105 - of no real service
USERS = [f"u{number}" for number in range(24)]
SLATE_SIZE = 5


def wait_for(condition: Callable[[], Any], what: str, deadline_s: float = 90) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.02)
    return value


class DurableValkey:
    """The Valkey at a URL (`infra.local.valkey`), which is killed, and comes back on the same port with its append-only file."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._again: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        with redis.Redis.from_url(self.url) as client:
            process = psutil.Process(client.info("server")["process_id"])
        self._program, self._folder = process.exe(), process.cwd()
        process.kill()
        process.wait(30)

    def start_again(self) -> None:
        self._again = subprocess.Popen([self._program, "valkey.conf"], cwd=self._folder, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            wait_for(lambda: _answers(client), "Valkey", 30)

    def end(self) -> None:
        if self._again is not None:
            self._again.terminate()
            self._again.wait(30)


def _answers(client: redis.Redis) -> bool:
    with suppress(redis.RedisError):
        return bool(client.ping())
    return False


def replicas(deployment: str) -> set[int]:
    """Process ids of a deployment's replicas."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"{APP}:{deployment}" in " ".join(process.cmdline()[:1]):
                found.add(process.pid)
    return found


@dataclass
class Served:
    """The running service."""

    url: str
    config: Config
    bundle_uri: str
    version: str
    valkey: DurableValkey
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {TOKEN}"})

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, headers=self.headers)

    def publish(self) -> None:
        """Slates of all users, of the served version."""
        items = tuple(f"i{number}" for number in range(SLATE_SIZE))
        now = time.time_ns() // 1_000_000
        with SlateStore.of(self.config.slate_store, self.valkey.url) as store:
            slates = [Slate(user, items, (1.0,) * SLATE_SIZE, self.version, now) for user in USERS]
            store.publish_fallback(self.version, Slate("", items, (1.0,) * SLATE_SIZE, self.version, now))
            store.complete(self.version, users=store.publish(self.version, slates))
            store.activate(self.version)

    def fresh_slate(self, client: httpx.Client, user: str) -> dict[str, Any]:
        """Trigger a slate, and the answer once it is fresh."""
        trigger = client.post("/v1/requests", json={"user_id": user, "events": [{"item_id": "i3", "level": 3}]})
        assert trigger.status_code == 202, trigger.text
        return wait_for(lambda: _if_fresh(client.get(f"/v1/users/{user}/slate").json()), f"the fresh slate of {user}")

    @contextmanager
    def load(self, threads: int = 3) -> Iterator[list[tuple[int, str, str]]]:
        """Read slates all the while; yields status, source and version of each answer so far."""
        seen: list[tuple[int, str, str]] = []
        done = threading.Event()

        def read(start: int) -> None:
            with self.client() as client:
                for turn in range(start, 1_000_000):
                    if done.is_set():
                        return
                    answer = client.get(f"/v1/users/{USERS[turn % len(USERS)]}/slate")
                    body = answer.json() if answer.is_success else {}
                    seen.append((answer.status_code, body.get("source", answer.text), body.get("model_version", "")))

        with ThreadPoolExecutor(threads) as pool:
            readers = [pool.submit(read, 7 * number) for number in range(threads)]
            try:
                yield seen
            finally:
                done.set()
            for reader in readers:
                reader.result()  # raises what went wrong there


def more(seen: list[Any], count: int) -> None:
    """Wait until so many more were answered."""
    wanted = len(seen) + count
    wait_for(lambda: len(seen) >= wanted, f"{count} more answers")


def _if_fresh(slate: dict[str, Any]) -> dict[str, Any] | None:
    return slate if slate["source"] == "fresh" else None


def write_small_bundle(folder: Path, config: Config) -> str:
    """A committed bundle with the weights of no model, and the SID codes that they would have been trained on."""
    rest = {"text": "", "category": "", "brand": "", "embedding": None, "popularity": 1}
    rows = [{"item_index": i, "item_id": f"i{i}", "title": f"Title {i}", **rest} for i in range(N_ITEMS)]
    for name in CODER_FILES:
        storage.write_bytes(str(folder / "coder" / name), b"what gave the items their SIDs")
    weights, catalogue = save({"sid_codes": codes_of(sids())}), pa.Table.from_pylist(rows, schema=records.CATALOGUE)
    uri = str(folder / "bundle")
    write_bundle(uri, config=config, weights=weights, sids=sids(), catalogue=catalogue, coder=str(folder / "coder"), metadata={})
    return uri


def load_without_torch(uri: str) -> Any:
    """A bundle that was verified as real ones are, and ranks without a model: what follows the last item on the ring."""

    class Bundle:
        version = verified_version(uri)
        item_ids = [f"i{number}" for number in range(N_ITEMS)]

        def recommender(self) -> Any:
            return self

        def recommend(self, histories: Sequence[History], k: int, *, exclude_seen: bool) -> list[Ranked]:
            starts = [int(history.items[-1]) + 1 if len(history.items) else 0 for history in histories]
            return [Ranked(np.arange(start, start + k) % N_ITEMS, -np.arange(k, dtype=np.float32)) for start in starts]

    return Bundle()


class Gated:
    """The same loader, whose recommender stops after one batch until a file is there."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def __call__(self, uri: str) -> Any:
        bundle, gate, batches = load_without_torch(uri), self.gate, list[Any]()
        recommend = bundle.recommend

        def gated(*arguments: Any, **options: Any) -> Any:
            batches.append(arguments)
            if len(batches) > 1:
                wait_for(gate.exists, "the gate")
            return recommend(*arguments, **options)

        bundle.recommend = gated
        return bundle
