"""Every metric, in one table a kind of process, and the meter that counts them.

Each process keeps them for itself; a Ray process hands them on to Ray's own exporter, which a Prometheus that watches the
cluster scrapes. The ingress' `/metrics` shows those of all replicas, each under its name; the streaming trainer has a port
of its own. All give the names below the prefix `ray_`, counters the suffix `_total`, so that one dashboard fits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import prometheus_client as prometheus
from prometheus_client.registry import Collector

from infra.local import free_port, require_port
from infra.logs import get_logger

PREFIX = "ray_"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_LONG_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100)
_HANDED_ON_S = 1.0  # Ray exports every ten seconds, and forgets a gauge that was silent for two of its intervals
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nothing here asks for


class Metric(NamedTuple):
    """What is measured: kind, meaning, names of the labels, upper bounds of a histogram, values of the one label.

    A label whose values are known is there with all of them from the start, at 0: a counter that appeared with its first
    event would hide that event from `increase`.
    """

    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    known: tuple[str, ...] = ()


_OUTCOMES = ("stored", "late", "unknown version", "dropped version", "failed")
INGRESS: Mapping[str, Metric] = {
    "rankgr_slates": Metric("counter", "Slates answered.", ("source",), (), ("fresh", "stored", "stale", "popular", "fallback")),
    "rankgr_slate_seconds": Metric("histogram", "Time to look slates up, a request.", (), _SECONDS),
    "rankgr_slate_age_seconds": Metric("histogram", "Age of the slates answered.", (), (1, 10, 60, 600, 3600, 21600, 86400, 259200)),
    "rankgr_store_failures": Metric("counter", "Look-ups that Redis did not answer."),
    "rankgr_events": Metric("counter", "Events taken in."),
    "rankgr_triggers": Metric("counter", "Early triggers.", ("outcome",), (), ("accepted", "joined", "shed")),
    "rankgr_fresh_slates": Metric("counter", "Computations of fresh slates that ended.", ("outcome",), (), _OUTCOMES),
    "rankgr_fresh_seconds": Metric("histogram", "From a trigger to its fresh slate.", (), _SECONDS),
    "rankgr_pending_slates": Metric("gauge", "Fresh slates under way in an ingress replica."),
}
MODEL: Mapping[str, Metric] = {
    "rankgr_batch_users": Metric("histogram", "Users of a batch of a model replica.", (), (1, 2, 4, 8, 16, 32, 64, 128)),
    "rankgr_batch_seconds": Metric("histogram", "Time of a batch in the model.", (), _SECONDS),
    "rankgr_model_loaded": Metric("gauge", "1 for each model version that a replica holds.", ("version",)),
    "rankgr_swaps": Metric("counter", "Bundles that replicas were told to load.", ("outcome",), (), ("done", "refused")),
    "rankgr_swap_seconds": Metric("histogram", "Time to load a bundle aside and take it into use.", (), _LONG_SECONDS),
}
_REASONS = (
    "not JSON", "too large", "fields are missing or unknown", "a field is of another type", "unknown level", "unknown item",
    "from the future", "too old", "duplicate", "trimmed before it was read",
)  # fmt: skip
TRAINER: Mapping[str, Metric] = {
    "rankgr_stream_entries": Metric("counter", "Entries of the stream that were read."),
    "rankgr_stream_trained": Metric("counter", "Events that became targets of a step."),
    "rankgr_stream_rejected": Metric("counter", "Entries that were not handed out.", ("reason",), (), _REASONS),
    "rankgr_stream_lag_entries": Metric("gauge", "Entries that were not read yet."),
    "rankgr_stream_lag_seconds": Metric("gauge", "Age of the oldest entry that was not read yet."),
    "rankgr_stream_pending": Metric("gauge", "Entries that were read and are in no committed checkpoint yet."),
    "rankgr_stream_failures": Metric("counter", "Reads that Redis did not answer."),
    "rankgr_train_steps": Metric("counter", "Optimizer steps.", ("outcome",), (), ("done", "skipped")),
    "rankgr_train_step_seconds": Metric("histogram", "Time of an optimizer step.", (), _SECONDS),
    "rankgr_train_loss": Metric("gauge", "Running mean of the loss on new rows, before each step."),
    "rankgr_train_drift": Metric("gauge", "Distance of the weights from the served ones, relative to their length."),
    "rankgr_train_rollbacks": Metric("counter", "How often weights were taken back."),
    "rankgr_train_checkpoint_seconds": Metric("histogram", "Time to commit a checkpoint.", (), _SECONDS),
    "rankgr_gate_decisions": Metric("counter", "Decisions on weights that were set aside.", ("decision",), (), ("passed", "refused")),
    "rankgr_release_seconds": Metric("histogram", "From the gate's yes to a new champion.", (), _LONG_SECONDS),
}
METRICS: Mapping[str, Metric] = {**INGRESS, **MODEL, **TRAINER}


class Meter:
    """Counts what happens in one process.

    Args:
        metrics: that this process counts.
        to_ray: hand everything on to Ray's exporter, every second; only in a process of a Ray cluster.
    """

    def __init__(self, metrics: Mapping[str, Metric] = INGRESS, *, to_ray: bool = False) -> None:
        self.registry = prometheus.CollectorRegistry()
        self._local: dict[str, Any] = {}
        for name, metric in metrics.items():
            options: dict[str, Any] = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
            kind = {"counter": prometheus.Counter, "gauge": prometheus.Gauge, "histogram": prometheus.Histogram}[metric.kind]
            self._local[name] = kind(PREFIX + name, metric.meaning, metric.tags, registry=self.registry, **options)
            for value in metric.known:
                self._local[name].labels(value)
        if to_ray:
            threading.Thread(target=_hand_on, args=(self.registry,), name="metrics", daemon=True).start()

    def count(self, name: str, amount: float = 1, **tags: str) -> None:
        """Add to a counter."""
        self._of(name, tags).inc(amount)

    def observe(self, name: str, *values: float) -> None:
        """Put values into a histogram."""
        for value in values:
            self._local[name].observe(value)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge."""
        self._of(name, tags).set(value)

    def families(self) -> list[prometheus.Metric]:
        """All metrics of this process as they are now."""
        return list(self.registry.collect())

    def text(self) -> bytes:
        """All metrics of this process in Prometheus' text format."""
        return prometheus.generate_latest(self.registry)

    def _of(self, name: str, tags: Mapping[str, str]) -> Any:
        return self._local[name].labels(**tags) if tags else self._local[name]


def _hand_on(registry: prometheus.CollectorRegistry) -> None:
    """Tell Ray's exporter all samples, again and again.

    As gauges, each under the name of its sample. Prometheus takes rates and quantiles by name, and Ray's own histograms are
    dear: the process that exports the metrics of a node records each value that was observed anew, in Python.
    """
    gauges: dict[str, Any] = {}
    while True:
        try:
            for family in registry.collect():
                # The last bucket of a histogram first: one that holds another is never behind it.
                for sample in reversed(family.samples):
                    _ray_gauge(gauges, sample.name, family.documentation, sample.labels).set(sample.value, sample.labels)
        except Exception:
            get_logger("metrics").exception("metrics were not handed on to Ray's exporter")
        time.sleep(_HANDED_ON_S)


def _ray_gauge(gauges: dict[str, Any], name: str, meaning: str, labels: Mapping[str, str]) -> Any:
    from ray.util.metrics import Gauge

    if name not in gauges:
        gauges[name] = Gauge(name.removeprefix(PREFIX), description=meaning, tag_keys=tuple(labels))
    return gauges[name]


class _Replicas(Collector):
    def __init__(self, families: Mapping[str, Iterable[prometheus.Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[prometheus.Metric]:
        merged: dict[str, prometheus.Metric] = {}
        for replica, families in sorted(self._families.items()):
            for family in families:
                into = merged.setdefault(family.name, prometheus.Metric(family.name, family.documentation, family.type))
                into.samples += [sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples]
        yield from merged.values()


def text_of(families: Mapping[str, Iterable[prometheus.Metric]]) -> bytes:
    """Metrics of several replicas in Prometheus' text format; the label `replica` says whose a figure is."""
    registry = prometheus.CollectorRegistry()
    registry.register(_Replicas(families))
    return prometheus.generate_latest(registry)


@contextmanager
def exported(meter: Meter, host: str, port: int, *, setting: str) -> Iterator[str]:
    """Answer Prometheus at a port of this process' own; yields the URL.

    Args:
        meter: what is shown.
        host: interface.
        port: 0 takes a free one.
        setting: that chose the port, for the message.

    Raises:
        ServiceError: the port is taken.
    """
    if port:
        require_port(host, port, setting=setting)
    port = port or free_port(host)
    server, thread = prometheus.start_http_server(port, host, meter.registry)
    url = f"http://{host}:{port}/metrics"
    get_logger("metrics").info("for Prometheus", url=url)
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
