"""Every metric of the service, in one table, and the meter that counts them.

In a Ray process they go to Ray's own exporter, which a Prometheus that watches the cluster scrapes; each process keeps
them for itself too, for its `/metrics` page. Both give the names below the prefix `ray_`, counters the suffix `_total`,
so that one dashboard fits both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import prometheus_client as prometheus

PREFIX = "ray_"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Metric(NamedTuple):
    """What is measured: kind, meaning, names of the labels, upper bounds of a histogram."""

    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "rankgr_slates": Metric("counter", "Slates answered.", ("source",)),
    "rankgr_slate_seconds": Metric("histogram", "Time to look slates up, a request.", (), _SECONDS),
    "rankgr_slate_age_seconds": Metric("histogram", "Age of the slates answered.", (), (1, 10, 60, 600, 3600, 21600, 86400, 259200)),
    "rankgr_store_failures": Metric("counter", "Look-ups that Redis did not answer."),
    "rankgr_events": Metric("counter", "Events taken in."),
    "rankgr_triggers": Metric("counter", "Early triggers.", ("outcome",)),
    "rankgr_fresh_slates": Metric("counter", "Computations of fresh slates that ended.", ("outcome",)),
    "rankgr_fresh_seconds": Metric("histogram", "From a trigger to its fresh slate.", (), _SECONDS),
    "rankgr_pending_slates": Metric("gauge", "Fresh slates under way in an ingress replica."),
    "rankgr_batch_users": Metric("histogram", "Users of a batch of a model replica.", (), (1, 2, 4, 8, 16, 32, 64, 128)),
    "rankgr_batch_seconds": Metric("histogram", "Time of a batch in the model.", (), _SECONDS),
    "rankgr_model_loaded": Metric("gauge", "1 for each model version that a replica holds.", ("version",)),
    "rankgr_swaps": Metric("counter", "Bundles that replicas were told to load.", ("outcome",)),
    "rankgr_swap_seconds": Metric("histogram", "Time to load a bundle aside and take it into use.", (), (0.1, 0.3, 1, 3, 10, 30, 100)),
}


class Meter:
    """Counts what happens in one process.

    Args:
        to_ray: hand everything to Ray's exporter too; only in a process of a Ray cluster.
    """

    def __init__(self, *, to_ray: bool = False) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._local: dict[str, Any] = {}
        for name, metric in METRICS.items():
            options: dict[str, Any] = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
            kind = {"counter": prometheus.Counter, "gauge": prometheus.Gauge, "histogram": prometheus.Histogram}[metric.kind]
            self._local[name] = kind(PREFIX + name, metric.meaning, metric.tags, registry=self.registry, **options)
        self._ray = {name: _ray_metric(name, metric) for name, metric in METRICS.items()} if to_ray else {}

    def count(self, name: str, amount: float = 1, **tags: str) -> None:
        """Add to a counter."""
        self._of(name, tags).inc(amount)
        if self._ray:
            self._ray[name].inc(amount, tags)

    def observe(self, name: str, value: float) -> None:
        """Put a value into a histogram."""
        self._local[name].observe(value)
        if self._ray:
            self._ray[name].observe(value)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self._of(name, tags).set(value)
        if self._ray:
            self._ray[name].set(value, tags)

    def text(self) -> bytes:
        """All metrics of this process in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)

    def _of(self, name: str, tags: Mapping[str, str]) -> Any:
        return self._local[name].labels(**tags) if tags else self._local[name]


def _ray_metric(name: str, metric: Metric) -> Any:
    from ray.util import metrics

    options: dict[str, Any] = {"boundaries": list(metric.buckets)} if metric.kind == "histogram" else {}
    kind = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}[metric.kind]
    return kind(name, description=metric.meaning, tag_keys=metric.tags, **options)
