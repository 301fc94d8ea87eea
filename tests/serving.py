"""A running service for tests that break it: ingress and model replicas, a tiny real model, a Valkey that can be killed."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis

from components.precompute.job import load_bundle
from infra.config import Config
from infra.slate_store import Slate, SlateStore
from serving.app import APP

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
        self._command, self._folder = process.cmdline(), process.cwd()
        process.kill()
        process.wait(30)

    def start_again(self) -> None:
        self._again = subprocess.Popen(self._command, cwd=self._folder, stdout=subprocess.DEVNULL)
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


class Gated:
    """Loads a bundle whose recommender stops after one batch until a file is there."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate

    def __call__(self, uri: str) -> Any:
        bundle, gate = load_bundle(uri), self.gate
        ranks, batches = bundle.recommender(), []

        class Recommender:
            def recommend(self, *arguments: Any, **options: Any) -> Any:
                batches.append(arguments)
                if len(batches) > 1:
                    wait_for(gate.exists, "the gate", 60)
                return ranks.recommend(*arguments, **options)

        object.__setattr__(bundle, "recommender", Recommender)
        return bundle
