"""What `tests.benchmarks.serve` measures: bundles of the quickstart's size, slates in a Valkey, the application, its peer."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra import records, storage
from infra.cluster import ray_session
from infra.config import Config, load_config
from infra.local import free_port, no_process_left, valkey
from infra.service_sections import ClusterConfig
from infra.slate_store import SlateStore, UserHistory

ITEMS, USERS, EVENTS, SLATE = 1_682, 700, 50, 100
REPLICAS = 2  # of the ingress and of its peer: one a core
"""Films of MovieLens-100K, most of its users, the model's longest history, items a slate."""
PREFIX = "rankgr"
_TOKEN = "RANKGR_TOKEN"  # noqa: S105 - the name of a variable


def choose_proxy(*, haproxy: bool) -> None:
    """Must come before anything imports Ray: it reads these variables once, and its workers inherit them."""
    os.environ[_TOKEN] = secrets.token_hex(16)
    if haproxy:
        ports = {name: str(free_port()) for name in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")}
        os.environ.update({"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", **ports})
    else:  # a caller may have chosen the other one
        for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
            os.environ.pop(name, None)


def settings() -> Config:
    """The quickstart's model with slates of 100."""
    serving = ["serving.port=0", f"serving.retrieval_replicas={REPLICAS}", f"serving.tokens=[env:{_TOKEN}]"]
    return load_config(preset="small", overrides=[*serving, f"decoding.slate_size={SLATE}", "training.threads_per_worker=1"])


def authorization() -> dict[str, str]:
    """The header that lets a POST in."""
    return {"Authorization": f"Bearer {os.environ[_TOKEN]}"}


def write_random_bundle(folder: Path, config: Config, seed: int) -> str:
    """A bundle of the preset's architecture with random weights: the work of a trained one."""
    from safetensors.torch import save

    from components.retriever.bundle import write_bundle
    from components.semantic_ids.coder import FILES
    from components.training.checkpoint import trained_state
    from components.training.loop import build_model

    rng = np.random.default_rng(0)
    paths = rng.choice(config.semantic_ids.codes**2, size=ITEMS, replace=False)
    popularity = rng.integers(1, 600, ITEMS).tolist()
    ids = [{"item_index": i, "item_id": str(i + 1), "popularity": popularity[i]} for i in range(ITEMS)]
    sids = [{**row, "codes": list(divmod(int(path), config.semantic_ids.codes))} for row, path in zip(ids, paths, strict=True)]
    films = [{**row, "title": f"The Long Film, Part {i} (1997)", "text": "", "category": "drama", "brand": "", "embedding": None}
             for i, row in enumerate(ids)]  # fmt: skip
    for name in FILES:
        storage.write_bytes(str(folder / "coder" / name), b"not used here")
    table = pa.Table.from_pylist(sids, schema=records.SIDS)
    weights = save(trained_state(build_model(config.model_copy(update={"seed": seed}), table)))
    catalogue = pa.Table.from_pylist(films, schema=records.CATALOGUE)
    coder, uri = str(folder / "coder"), str(folder / "bundle")
    write_bundle(uri, config=config, weights=weights, sids=table, catalogue=catalogue, coder=coder, metadata={})
    return uri


def histories(users: int) -> list[UserHistory]:
    """What the users did."""
    rng = np.random.default_rng(1)
    return [
        UserHistory(f"user-{u}", tuple(str(i + 1) for i in rng.integers(0, ITEMS, EVENTS)), tuple(rng.integers(1, 5, EVENTS).tolist()), 1)
        for u in range(users)
    ]


def publish(store: SlateStore, config: Config, bundle_uri: str, users: int) -> str:
    """Real slates of so many users, computed by the bundle; returns the version."""
    from components.precompute.job import history_of, load_bundle, slates_of

    bundle, past = load_bundle(bundle_uri), histories(users)
    recommender, batch = bundle.recommender(), config.decoding.users_per_batch
    store.publish_histories(past)
    for start in range(0, len(past), batch):
        chunk = past[start : start + batch]
        indices = [history_of([int(i) - 1 for i in one.item_ids], one.levels, config.retriever.history_min_level) for one in chunk]
        names = [one.user_id for one in chunk]
        slates = slates_of(bundle, names, indices, k=SLATE, exclude_seen=config.decoding.exclude_seen, recommender=recommender)
        assert all(len(slate.item_ids) == SLATE for slate in slates)
        store.publish(bundle.version, slates)
    store.complete(bundle.version, users=len(past))
    store.activate(bundle.version)
    return str(bundle.version)


@dataclass(frozen=True)
class World:
    """A running service and its peer.

    Attributes:
        url: of the service.
        echo: URL of the peer.
        bundles: the served one, and one to swap in.
        versions: theirs.
        users: how many have a slate.
    """

    folder: Path
    config: Config
    redis_url: str
    url: str
    echo: str
    bundles: tuple[str, str]
    versions: tuple[str, str]
    users: int


@contextmanager
def running(folder: Path, users: int = USERS) -> Iterator[World]:
    """Valkey, Ray, the application and its peer on this machine."""
    config = settings()
    bundles = (write_random_bundle(folder / "one", config, 1), write_random_bundle(folder / "two", config, 2))
    versions = (_version(bundles[0]), _version(bundles[1]))
    with no_process_left(), valkey(folder / "valkey") as redis_url:
        with SlateStore.of(config.slate_store, redis_url) as store:
            publish(store, config, bundles[0], users)
        with ray_session(ClusterConfig(cpus=4), niceness=0):
            from serving.app import start
            from tests.benchmarks.serve_peers import run_echo

            with start(config, bundles[0], redis_url, version=versions[0], ends_with_cluster=True) as url:
                echo = run_echo(url, redis_url, f"{PREFIX}:slate:{versions[0]}:", REPLICAS)
                yield World(folder, config, redis_url, url, echo, bundles, versions, users)


def _version(bundle_uri: str) -> str:
    return storage.open_committed(bundle_uri).digest[:12]


@dataclass(frozen=True)
class Measured:
    """What a load met: an entry a request, in the order in which they ended (see `http_load.Done`)."""

    at: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]
    status: npt.NDArray[np.int64]
    request: npt.NDArray[np.int64]
    version: npt.NDArray[np.int64]
    crc: npt.NDArray[np.int64]
    mixed: npt.NDArray[np.bool_]
    versions: npt.NDArray[np.str_]

    def rate(self) -> float:
        """Good answers a second."""
        good = self.status == 200
        return float(good.sum() / ((self.at + self.seconds).max() - self.at.min()))

    def percentile(self, p: float) -> float:
        """Of the time of a request, in milliseconds."""
        return float(np.percentile(self.seconds, p) * 1e3)

    def failed(self) -> int:
        """Requests without status 200."""
        return int((self.status != 200).sum())

    def between(self, start: float, end: float) -> Measured:
        """Those that fell due within a time."""
        kept = (self.at >= start) & (self.at < end)
        return Measured(
            **{name: getattr(self, name)[kept] for name in self.__dataclass_fields__ if name != "versions"}, versions=self.versions
        )


class Client:
    """A load under way in a process of its own.

    Args:
        folder: for its files.
        url: base URL.
        requests: method, target, headers and body of each; they are drawn at random.
        seconds: how long.
        connections: at once.
        rate: a second; None: as fast as answers come.
        check: look into the slates.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        requests: Sequence[tuple[str, str, dict[str, str], str]],
        seconds: float,
        *,
        connections: int = 32,
        rate: float | None = None,
        check: bool = False,
    ) -> None:
        name = secrets.token_hex(4)
        self._out, job = folder / f"{name}.npz", folder / f"{name}.json"
        fields: dict[str, Any] = {"url": url, "requests": list(requests), "seconds": seconds, "connections": connections, "rate": rate}
        job.write_text(json.dumps({**fields, "check": check, "seed": int(name, 16), "out": str(self._out)}), "utf-8")
        self._process = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.http_load", str(job)])

    def stop(self) -> None:
        """Let nothing more fall due."""
        self._process.terminate()

    def result(self) -> Measured:
        """Waits for the end."""
        assert self._process.wait() == 0
        with np.load(self._out) as columns:
            return Measured(**dict(columns))


def reads(users: int, k: int = SLATE) -> list[tuple[str, str, dict[str, str], str]]:
    """Slates of single users."""
    return [("GET", f"/v1/users/user-{u}/slate?k={k}", {}, "") for u in range(users)]


def batches(users: int, size: int = 100, count: int = 200) -> list[tuple[str, str, dict[str, str], str]]:
    """Slates of some users at once."""
    rng = np.random.default_rng(2)
    chosen = [rng.choice(users, size, replace=False).tolist() for _ in range(count)]
    bodies = [json.dumps({"user_ids": [f"user-{u}" for u in some], "k": SLATE}) for some in chosen]
    return [("POST", "/v1/slates:batch", authorization(), body) for body in bodies]
