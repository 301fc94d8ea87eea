"""Every metric of the service, in one table, and the meter that counts them.

In a Ray process they go to Ray's own exporter, which a Prometheus that watches the cluster scrapes; each process keeps
them for itself too, for its `/metrics` page. Both give the names below the prefix `ray_`, counters the suffix `_total`,
so that one dashboard fits both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import prometheus_client as prometheus
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as PrometheusMetric
from prometheus_client.utils import floatToGoString

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
    """Counts what happens in one process, in one thread; so cheaply that a request which takes a tenth of a millisecond can be counted.

    Args:
        to_ray: hand everything to Ray's exporter too; only in a process of a Ray cluster.
    """

    def __init__(self, *, to_ray: bool = False) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._histograms: dict[str, _Histogram] = {}
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                self._histograms[name] = _Histogram(metric.buckets)
            else:
                self._values[name] = {} if metric.tags else {(): 0.0}
        self._ray = {name: _ray_metric(name, metric) for name, metric in METRICS.items()} if to_ray else {}
        self.registry.register(self)  # which then asks `collect`

    def count(self, name: str, amount: float = 1, **tags: str) -> None:
        """Add to a counter."""
        values, key = self._values[name], tuple(tags[tag] for tag in METRICS[name].tags)
        values[key] = values.get(key, 0.0) + amount
        if self._ray:
            self._ray[name].inc(amount, tags)

    def observe(self, name: str, *values: float) -> None:
        """Put values into a histogram."""
        self._histograms[name].add(values)
        if self._ray:
            metric = self._ray[name]
            for value in values:
                metric.observe(value)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self._values[name][tuple(tags[tag] for tag in METRICS[name].tags)] = float(value)
        if self._ray:
            self._ray[name].set(value, tags)

    def text(self) -> bytes:
        """All metrics of this process in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)

    def collect(self) -> Iterator[PrometheusMetric]:
        """All metrics, as Prometheus' client wants them."""
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                yield self._histograms[name].family(PREFIX + name, metric.meaning)
                continue
            family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(
                PREFIX + name, metric.meaning, labels=metric.tags
            )
            for tags, value in self._values[name].items():
                family.add_metric(tags, value)
            yield family


class _Histogram:
    """How many values lie below each bound and not below the one before, the last without bound; and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, values: Iterable[float]) -> None:
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def family(self, name: str, meaning: str) -> PrometheusMetric:
        family, below = HistogramMetricFamily(name, meaning), accumulate(self._counts)
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        family.add_metric([], list(zip(bounds, below, strict=True)), self._sum)
        return family


def _ray_metric(name: str, metric: Metric) -> Any:
    from ray.util import metrics

    options: dict[str, Any] = {"boundaries": list(metric.buckets)} if metric.kind == "histogram" else {}
    kind = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}[metric.kind]
    return kind(name, description=metric.meaning, tag_keys=metric.tags, **options)
