"""Progress of work that runs in other processes: they count into an actor, the driver shows rate and ETA."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from infra.logs import ProgressMeter

_POLL_S = 0.5


class _Counter:
    def __init__(self) -> None:
        self._already: int | None = None
        self._done = 0
        self._total = 0
        self._figures: dict[str, Any] = {}

    def set(self, done: int, total: int, figures: dict[str, Any]) -> None:
        # What the first call tells was done before this attempt.
        self._already = done if self._already is None else self._already
        self._done, self._total, self._figures = done, total, figures

    def get(self) -> tuple[int, int, int, dict[str, Any]]:
        return self._already or 0, self._done, self._total, self._figures


@contextmanager
def remote_progress(*, step: str, unit: str) -> Iterator[Any]:
    """A Ray actor with `set(done, total, figures)`; what it is told is shown here until the context ends.

    The first call says where the work starts, 0 or what an interrupted attempt had done.

    Args:
        step: shown in front.
        unit: what is counted, in the plural.
    """
    import ray

    counter = ray.remote(num_cpus=0)(_Counter).remote()
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(counter, stop, step, unit), daemon=True)
    watcher.start()
    try:
        yield counter
    finally:
        stop.set()
        watcher.join()
        ray.kill(counter)


def _watch(counter: Any, stop: threading.Event, step: str, unit: str) -> None:
    import ray

    meter: ProgressMeter | None = None
    ends = False
    while not ends:
        ends = stop.wait(_POLL_S)  # and once more at the end
        try:
            already, done, total, figures = ray.get(counter.get.remote(), timeout=10)
        except ray.exceptions.RayError:
            continue  # the cluster is busy or going away; the work itself reports what is wrong
        if not total:
            continue
        meter = meter or ProgressMeter(total, step=step, unit=unit, already=already)
        if done > meter.done:
            meter.advance(done - meter.done, **figures)
    if meter is not None:
        meter.close()
