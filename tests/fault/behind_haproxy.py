"""A service behind HAProxy, asked and broken: `python -m tests.fault.behind_haproxy FOLDER SETTINGS KILLS` prints what was seen as JSON.

A process of its own, since Ray reads once, when it is imported, whether HAProxy is there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from infra import storage
from infra.cluster import ray_session
from infra.local import no_process_left, valkey
from serving.app import start
from tests.serving import USERS, DurableValkey, Served, load_without_torch, more, replicas, wait_for, write_small_bundle
from tests.unit.components.training.small import configuration

READERS = 8


def ask(served: Served) -> dict[str, Any]:
    """One request of each kind."""
    with served.client() as client:
        slate = client.get("/v1/users/u1/slate").json()
        refused = client.post("/v1/slates:batch", json={"user_ids": ["u1"]}, headers={"Authorization": ""}).status_code
        return {"slate": slate, "refused": refused, "fresh": served.fresh_slate(client, "u2")["source"]}


def read(served: Served, user: str, seen: list[str], done: threading.Event) -> None:
    """Ask for a slate again and again; notes the source of each answer, or what went wrong."""
    with served.client() as client:
        while not done.is_set():
            try:
                answer = client.get(f"/v1/users/{user}/slate")
                seen.append(answer.json()["source"] if answer.is_success else f"status {answer.status_code}")
            except httpx.HTTPError as error:
                seen.append(str(error))


def kill_under_load(served: Served, kills: int) -> Counter[str]:
    """Kill an ingress replica so many times, each time once there are two; returns what readers saw."""
    seen, done = list[str](), threading.Event()
    with ThreadPoolExecutor(READERS) as pool:
        readers = [pool.submit(read, served, user, seen, done) for user in USERS[:READERS]]
        try:
            for _ in range(kills):
                more(seen, 200)
                before = replicas("Ingress")
                os.kill(min(before), signal.SIGKILL)
                wait_for(lambda b=before: len(replicas("Ingress")) == len(b) and replicas("Ingress") != b, "another ingress replica")
            more(seen, 200)
        finally:
            done.set()
    for reader in readers:
        reader.result()  # raises what went wrong there
    return Counter(seen)


def main() -> None:
    """Run the service in the mode that the environment asks for."""
    folder, config, kills = Path(sys.argv[1]), configuration(*json.loads(sys.argv[2])), int(sys.argv[3])
    bundle = write_small_bundle(folder, config)
    version = storage.open_committed(bundle).digest[:12]
    with (
        no_process_left(),
        valkey(folder / "valkey") as redis_url,
        ray_session(config.cluster, niceness=0),
        start(config, bundle, redis_url, version=version, loader=load_without_torch, ends_with_cluster=True) as url,
    ):
        served = Served(url, config, bundle, version, DurableValkey(redis_url))
        served.publish()
        found = {"version": version, **ask(served), "answers": kill_under_load(served, kills)}
        port = os.environ.get("RAY_SERVE_HAPROXY_METRICS_PORT", "9101")
        found["figures"] = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
