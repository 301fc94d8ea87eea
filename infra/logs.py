"""Structured logs for people and machines, and progress with rate and ETA.

On a terminal a long step shows a live bar, elsewhere one plain line every few seconds. RANKGR_LOG_FORMAT=json gives
one JSON object a line.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import structlog
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
_LINE_EVERY_S = 5.0


def configure_logs(*, verbose: bool = False) -> None:
    """Set up structlog on standard error; call once a process."""
    as_json = os.environ.get("RANKGR_LOG_FORMAT") == "json"
    renderer: Any = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # of the moment: it may be redirected
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> Any:
    """A logger that puts the step's name on each line."""
    if not structlog.is_configured():
        configure_logs()
    return structlog.get_logger(step=name)


def track(items: Iterable[T], *, total: int, step: str, unit: str) -> Iterator[T]:
    """Pass items through and show how many are done, the rate and the time left.

    Args:
        total: number of items to come.
        step: name shown in front.
        unit: what an item is, in the plural.
    """
    meter = ProgressMeter(total, step=step, unit=unit)
    try:
        for item in items:
            yield item
            meter.advance()
    finally:
        meter.close()


class ProgressMeter:
    """Progress of one long step; `advance` may be called with any amount.

    Args:
        total: amount to do.
        step: shown in front.
        unit: what is counted, in the plural.
        already: done before, by an interrupted attempt; it does not count towards the rate.
    """

    def __init__(self, total: int, *, step: str, unit: str, already: int = 0) -> None:
        self.total, self.step, self.unit = total, step, unit
        self.done = self._already = already
        self._start = self._last_line = time.monotonic()
        self._log = get_logger(step)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(f"{step}: {unit}", total=total, rate="")
            self._bar.start()

    def advance(self, amount: int = 1, **figures: Any) -> None:
        """Count `amount` more; `figures` (a loss, say) are shown beside the rate."""
        self.done += amount
        now = time.monotonic()
        rate = max((self.done - self._already) / max(now - self._start, 1e-9), 1e-9)
        if self._bar is not None:
            shown = " ".join([f"{rate:.1f} {self.unit}/s", *(f"{k}={v}" for k, v in figures.items())])
            self._bar.update(self._task, completed=self.done, rate=shown)
        elif now - self._last_line >= _LINE_EVERY_S or self.done >= self.total:
            self._last_line = now
            eta = max(self.total - self.done, 0) / rate
            self._log.info(f"{self.done}/{self.total} {self.unit}", rate=f"{rate:.1f}/s", eta=f"{eta:.0f}s", **figures)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()
