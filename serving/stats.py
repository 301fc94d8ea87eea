"""What an ingress replica has answered: metrics for Prometheus, a summary for people."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel

from infra.metrics import Meter
from serving.slate_json import Answer

_LATEST = 2000
_HITS = ("fresh", "stored", "stale")


class StatsAnswer(BaseModel):
    """Answers of one replica since its start; latencies of its latest requests."""

    model_version: str
    uptime_s: float
    slates: int
    by_source: dict[str, int]
    hit_ratio: float | None
    latency_p50_ms: float | None
    latency_p99_ms: float | None


class Stats:
    """Counts answers.

    Args:
        meter: metrics go there.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
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

    def summary(self) -> StatsAnswer:
        """Totals, and percentiles of the latest requests; null before the first."""
        total = self._sources.total()
        p50, p99 = (round(float(p) * 1000, 3) for p in np.percentile(self._latest, [50, 99])) if self._latest else (None, None)
        return StatsAnswer(
            model_version=self._version,
            uptime_s=round(time.monotonic() - self._start, 1),
            slates=total,
            by_source=dict(self._sources),
            hit_ratio=round(sum(self._sources[source] for source in _HITS) / total, 4) if total else None,
            latency_p50_ms=p50,
            latency_p99_ms=p99,
        )
