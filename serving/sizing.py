"""What a service of a given size takes, from figures that were measured: replicas, cores, memory of Redis and of the service, shards.

Reads: tests/benchmarks/serve.py, slates of 100 items on two cores that the client shares. Slates: a user in batches of 16 on one core, the
quickstart's model (README, "Benchmarks"). Memory of processes: resident, of the quickstart's service. Slates in Redis: the bytes that the
codec writes. Shards: the log of tests/benchmarks/sessions.py, 250,000 to 2 million events a shard. What a model of another size takes, only
a run of these benchmarks with it can say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from infra.slate_codec import Slate, encode_slate

READS_PER_CORE = {"haproxy": 543.0, "default": 84.0}
"""Requests a second: 1,086 and 169 on two cores."""
SLATE_S = 0.0023
"""Of one core, a user."""
INGRESS_GB, MODEL_GB, CONTROL_GB = 0.25, 0.6, 1.5
"""Of an ingress replica, a model replica, and Ray's own processes with two proxies."""
KEY_BYTES = 100
"""Of Redis itself, an entry: key, pointers, rounding up of the allocator."""
HISTORY_BYTES = 12
"""Of a published history, an event, beside the item id."""
ITEM_BYTES = 400
"""Of an item in a replica: SID, trie, catalogue row with a title."""
HEADROOM = 0.6
"""Share of a core that is planned with; the rest is for peaks and for the replicas of one that failed."""

SHARD_EVENTS, MOST_SHARD_EVENTS = 500_000, 2_000_000
"""Events of a shard: as few while shards are few, no more than these were measured with."""
ENOUGH_SHARDS = 128
"""So many keep the workers of any cluster busy; from there on shards grow first, for files are their number times the log's length."""
SESSIONS_GB, EVENT_BYTES = 0.35, 420
"""Of a worker of the step sessions: itself, and an event of the shard that it holds."""
WRITTEN_AT_ONCE = 500_000
"""Events that a worker of that step gathers before it writes a file for each shard."""


@dataclass(frozen=True)
class Load:
    """What is asked of the service.

    Attributes:
        users: with a slate.
        items: of the catalogue.
        rps: slate reads a second at the peak.
        early_share: of these reads, how many are preceded by an early trigger, which computes a slate.
        slate_size: items a slate.
        history: events a user that are published.
        id_length: characters of an item id.
        bulk_hours: within which a bulk run has to be through.
        versions: slates that are kept, `slate_store.keep_versions`.
    """

    users: int
    items: int
    rps: float
    early_share: float = 0.1
    slate_size: int = 100
    history: int = 50
    id_length: int = 10
    bulk_hours: float = 4.0
    versions: int = 2


@dataclass(frozen=True)
class Plan:
    """What it takes; memory in GB, cores as fractions add up to whole nodes elsewhere."""

    ingress_replicas: int
    model_replicas: int
    bulk_cores: int
    redis_gb: float
    service_gb: float
    cores: int

    def cost(self, *, core: float, gb: float) -> float:
        """A month, given the prices of a core and of a GB for a month; cores of bulk runs are counted as if they stayed."""
        return (self.cores + self.bulk_cores) * core + (self.redis_gb + self.service_gb) * gb


def slate_bytes(load: Load) -> int:
    """Bytes of one slate in Redis, by the codec."""
    ids = tuple("0" * load.id_length for _ in range(load.slate_size))
    return len(encode_slate(Slate("", ids, tuple(0.0 for _ in ids), "0" * 12, 0, False))) + KEY_BYTES


def plan_of(load: Load, *, proxy: str = "haproxy") -> Plan:
    """The plan for a load: two ingress replicas at least, so that one may fail; one model replica at least.

    Args:
        load: what is asked.
        proxy: `haproxy` or `default`, Ray Serve's own.
    """
    ingress = max(math.ceil(load.rps / (READS_PER_CORE[proxy] * HEADROOM)), 2)
    models = max(math.ceil(load.rps * load.early_share * SLATE_S / HEADROOM), 1)
    bulk = max(math.ceil(load.users * SLATE_S / (load.bulk_hours * 3600)), 1)
    history = load.history * (HISTORY_BYTES + load.id_length) + KEY_BYTES
    redis = load.users * (load.versions * slate_bytes(load) + history) * 1.25 / 1e9  # a quarter for fragments and the stream
    catalogue = load.items * ITEM_BYTES / 1e9
    service = CONTROL_GB + ingress * (INGRESS_GB + catalogue) + models * (MODEL_GB + catalogue)
    return Plan(ingress, models, bulk, round(redis, 2), round(service, 2), ingress + models + 2)


@dataclass(frozen=True)
class Sharding:
    """How the step sessions may cut a log.

    Attributes:
        shards: `data.shards`, and files of timelines.
        worker_gb: memory of a worker.
        exchanged_files: that lie beside the output until the step ends, each written once and read once.
    """

    shards: int
    worker_gb: float
    exchanged_files: int


def sharding_of(events: int, users: int) -> Sharding:
    """Shards for a log, no more than users: a user is not cut.

    Args:
        events: of the log.
        users: in it.
    """
    size = min(max(events / ENOUGH_SHARDS, SHARD_EVENTS), MOST_SHARD_EVENTS)
    shards = min(max(math.ceil(events / size), 1), users)
    worker = SESSIONS_GB + events / shards * EVENT_BYTES / 1e9
    return Sharding(shards, round(worker, 2), shards * max(math.ceil(events / WRITTEN_AT_ONCE), 1))
