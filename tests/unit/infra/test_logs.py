"""Log lines for people and machines; progress with rate and time left."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from typing import Any

import pytest
import structlog

from infra import logs
from infra.logs import ProgressMeter, configure_logs, get_logger, track


@pytest.fixture(autouse=True)
def _json_lines(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RANKGR_LOG_FORMAT", "json")
    configure_logs()
    yield
    structlog.reset_defaults()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only when the test says so."""
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_is_a_json_object_with_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger("training").info("epoch done", loss=0.5)
    get_logger("training").debug("unseen")
    [line] = lines(capsys)
    assert (line["event"], line["step"], line["loss"], line["level"]) == ("epoch done", "training", 0.5, "info")


def test_verbose_shows_debug_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(verbose=True)
    get_logger("x").debug("seen")
    assert lines(capsys)[0]["event"] == "seen"


def test_lines_for_people_are_plain_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANKGR_LOG_FORMAT")
    configure_logs()
    get_logger("sids").warning("careful", items=3)
    text = capsys.readouterr().err
    assert "careful" in text
    assert "items=3" in text
    assert "\x1b" not in text


def test_lines_go_to_where_standard_error_points_now() -> None:
    log = get_logger("x")
    with redirect_stderr(io.StringIO()) as elsewhere:
        log.info("here")
    assert "here" in elsewhere.getvalue()


def test_progress_tells_count_rate_and_time_left_every_few_seconds(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    meter = ProgressMeter(100, step="train", unit="steps")
    for _ in range(10):
        clock[0] += 1
        meter.advance(2, loss=0.5)
    meter.close()
    shown = lines(capsys)
    assert [(line["event"], line["rate"], line["eta"], line["loss"]) for line in shown] == [
        ("10/100 steps", "2.0/s", "45s", 0.5),
        ("20/100 steps", "2.0/s", "40s", 0.5),
    ]


def test_the_last_line_says_that_all_is_done(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    for _ in track(range(3), total=3, step="train", unit="steps"):
        clock[0] += 1
    [line] = lines(capsys)
    assert (line["event"], line["eta"]) == ("3/3 steps", "0s")


def test_what_an_interrupted_attempt_did_does_not_count_towards_the_rate(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    meter = ProgressMeter(100, step="train", unit="steps", already=90)
    clock[0] += 5
    meter.advance(5)
    [line] = lines(capsys)
    assert (line["event"], line["rate"], line["eta"]) == ("95/100 steps", "1.0/s", "5s")


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(logs.sys, "stderr", terminal := Terminal())
    with_bar = ProgressMeter(4, step="train", unit="steps")
    with_bar.advance(2, loss=0.25)
    with_bar.close()
    assert "train: steps" in terminal.getvalue()
