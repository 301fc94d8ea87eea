"""Work in other processes tells how far it is; the driver shows it."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
import ray
import structlog

from infra import progress
from infra.logs import ProgressMeter, configure_logs
from infra.progress import remote_progress

pytestmark = pytest.mark.usefixtures("ray_cluster")


def _ends(counter: Any, deadline_s: float = 30) -> bool:
    """Whether an actor that was killed is gone; Ray takes its own time."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        try:
            ray.get(counter.get.remote())
        except ray.exceptions.RayActorError:
            return True
    return False


def test_what_a_worker_counts_is_shown_here_to_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = threading.Event()

    class Meter(ProgressMeter):
        def __init__(self, total: int, **options: Any) -> None:
            super().__init__(total, **options)
            seen.set()

    monkeypatch.setattr(progress, "ProgressMeter", Meter)
    monkeypatch.setenv("RANKGR_LOG_FORMAT", "json")
    configure_logs()
    with remote_progress(step="training", unit="epochs") as counter:
        ray.get(counter.set.remote(1, 3, {"loss": 0.9}))
        assert seen.wait(30)
        ray.get(counter.set.remote(3, 3, {"loss": 0.5}))
    structlog.reset_defaults()
    shown = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [(line["event"], line["loss"]) for line in shown] == [("3/3 epochs", 0.5)]
    assert _ends(counter)


def test_an_error_in_the_work_gets_through() -> None:
    with pytest.raises(ValueError, match="mine"), remote_progress(step="training", unit="epochs"):
        raise ValueError("mine")
