"""What the replicas have answered: each reports its metrics, one asks all of them; a summary of it for people."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import prometheus_client as prometheus
from pydantic import BaseModel

from infra.logs import get_logger
from infra.metrics import Meter, text_of
from serving.slate_json import Answer

_LATEST = 2000
_HITS = ("fresh", "stored", "stale")
_ANSWER_S = 1.0
_REST_S = 1.0  # however many look at the page, each replica is asked once in this time


class StatsAnswer(BaseModel):
    """Answers of all ingress replicas since their start; latencies of the latest requests of each."""

    model_version: str
    uptime_s: float
    replicas: int
    slates: int
    by_source: dict[str, int]
    hit_ratio: float | None
    latency_p50_ms: float | None
    latency_p99_ms: float | None


class Answered(NamedTuple):
    """What one ingress replica has answered: slates by source, seconds of its latest requests."""

    sources: Counter[str]
    latest: list[float]
    version: str
    uptime_s: float


class Report(NamedTuple):
    """What one replica has counted; `answered` is None for those that answer nobody."""

    replica: str
    families: list[prometheus.Metric]
    answered: Answered | None = None


class Stats:
    """Counts answers.

    Args:
        meter: metrics go there.
        replica: name of this replica.
    """

    def __init__(self, meter: Meter, replica: str = "ingress") -> None:
        self.meter, self.replica = meter, replica
        self._start, self._version = time.monotonic(), ""
        self._sources: Counter[str] = Counter()
        self._latest: deque[float] = deque(maxlen=_LATEST)

    def answered(self, answers: Sequence[Answer], seconds: float) -> None:
        """Count the answers of one request that took some seconds."""
        self._latest.append(seconds)
        self.meter.observe("rankgr_slate_seconds", seconds)
        sources: dict[str, int] = {}
        for answer in answers:
            sources[answer.source] = sources.get(answer.source, 0) + 1
        for source, slates in sources.items():
            self._sources[source] += slates
            self.meter.count("rankgr_slates", slates, source=source)
        self.meter.observe("rankgr_slate_age_seconds", *(answer.age_s for answer in answers))
        self._version = answers[-1].model_version

    def report(self) -> Report:
        """All counts as they are now."""
        uptime_s = time.monotonic() - self._start
        answered = Answered(self._sources.copy(), list(self._latest), self._version, uptime_s)
        return Report(self.replica, self.meter.families(), answered)


class Reports:
    """Reports of all replicas of the application.

    Args:
        own: counts of the replica that asks.
        others: asks all replicas, itself perhaps among them; an error counts as a replica that did not answer.
    """

    def __init__(self, own: Stats, others: Callable[[], Awaitable[Sequence[Report]]] | None = None) -> None:
        self.own, self._others = own, others
        self._latest: Sequence[Report] = ()
        self._until, self._asking = 0.0, asyncio.Lock()

    async def gather(self) -> list[Report]:
        """One report a replica: of this one as it is now, of the others at most a second old."""
        if self._others is not None:
            async with self._asking:
                if time.monotonic() >= self._until:
                    self._latest = await self._others()
                    self._until = time.monotonic() + _REST_S
        own = self.own.report()
        return [own, *(report for report in self._latest if report.replica != own.replica)]

    async def text(self) -> bytes:
        """Metrics of all replicas in Prometheus' text format."""
        return text_of({report.replica: report.families for report in await self.gather()})

    async def summary(self) -> StatsAnswer:
        """Totals, and percentiles of the latest requests; null before the first."""
        answered = [report.answered for report in await self.gather() if report.answered is not None]
        sources = sum((one.sources for one in answered), Counter[str]())
        latest, total = [seconds for one in answered for seconds in one.latest], sources.total()
        p50, p99 = (round(float(p) * 1000, 3) for p in np.percentile(latest, [50, 99])) if latest else (None, None)
        return StatsAnswer(
            model_version=next((one.version for one in answered if one.version), ""),
            uptime_s=round(max(one.uptime_s for one in answered), 1),
            replicas=len(answered),
            slates=total,
            by_source=dict(sources),
            hit_ratio=round(sum(sources[source] for source in _HITS) / total, 4) if total else None,
            latency_p50_ms=p50,
            latency_p99_ms=p99,
        )


async def ask_all(handle: Any) -> list[Report]:
    """Reports of all replicas of a Serve deployment; of those only that answer in time."""
    try:
        answers = await handle.broadcast("report").results_async(timeout_s=_ANSWER_S, return_exceptions=True)
    except Exception as error:  # none is there, or one hangs: those of other deployments are shown all the same
        get_logger("ingress").warning("no reports", deployment=handle.deployment_name, reason=str(error) or repr(error))
        return []
    return [answer for answer in answers if isinstance(answer, Report)]


def replica_name() -> str:
    """Name of the replica that this process is."""
    from ray import serve

    replica = serve.get_replica_context().replica_id
    return f"{replica.deployment_id.name}#{replica.unique_id}"
