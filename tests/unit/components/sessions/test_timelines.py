"""Checked events become timelines: requests, pages and phases on hand-made logs; order and sharding do not matter."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.sessions.timelines import Cuts, build_timelines, temporal_cuts
from infra.config import load_config
from infra.records import TIMELINES, Phase

MINUTE_MS = 60_000
NEVER = Cuts(2**60, 2**60)
TRAIN, VALID, TEST = Phase.TRAIN, Phase.VALID, Phase.TEST
SCHEMA = {"user_id": pl.String, "item_index": pl.Int32, "request_id": pl.String, "timestamp": pl.Int64, "level": pl.Int8}

Event = tuple[str, int, float, int] | tuple[str, int, float, int, str | None]  # user, item, minute, level, request


def frame(events: list[Event]) -> pl.DataFrame:
    rows = [(e[0], e[1], e[4] if len(e) > 4 else None, round(e[2] * MINUTE_MS), e[3]) for e in events]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def build(events: list[Event], *overrides: str, cuts: Cuts = NEVER) -> tuple[list[dict[str, Any]], dict[str, int]]:
    config = load_config(overrides=overrides)
    table, counts = build_timelines(frame(events), config.data, config.split, cuts)
    assert table.schema == TIMELINES
    return table.to_pylist(), counts


def test_one_row_a_user_in_time_order() -> None:
    rows, counts = build([("b", 1, 0, 3), ("a", 2, 5, 2), ("a", 1, 0, 3)])
    assert [row["user_id"] for row in rows] == ["a", "b"]
    assert rows[0]["items"] == [1, 2]
    assert rows[0]["timestamps"] == [0, 5 * MINUTE_MS]
    assert rows[0]["levels"] == [3, 2]
    assert counts == {"events": 3, "users": 2, "duplicates": 0, "merged": 0, "users_with_one_event": 1}


def test_a_gap_of_the_given_length_opens_a_request() -> None:
    [row], _ = build([("a", 1, 0, 3), ("a", 2, 29, 3), ("a", 3, 59, 3), ("a", 4, 88.9, 3)])
    assert row["requests"] == [0, 0, 1, 1]


def test_a_request_column_decides_alone() -> None:
    events: list[Event] = [("a", 1, 0, 3, "x"), ("a", 2, 600, 3, "x"), ("a", 3, 601, 3, "y"), ("a", 4, 602, 3, None), ("a", 5, 603, 3, "x")]
    [row], _ = build(events, "data.columns.request_id=session")
    assert row["requests"] == [0, 0, 1, 2, 3]


def test_requests_of_the_same_moment_stay_whole() -> None:
    events: list[Event] = [("a", item, 0, 3, "xy"[item % 2]) for item in range(8)]
    [row], _ = build(events, "data.columns.request_id=session")
    assert row["requests"] == [0] * 4 + [1] * 4


def test_a_long_request_is_cut_into_pages() -> None:
    events: list[Event] = [("a", item, item, 3) for item in range(5)] + [("a", 9, 100, 3)]
    [row], _ = build(events, "data.max_request_items=2")
    assert row["requests"] == [0, 0, 1, 1, 2, 3]


def test_duplicates_are_dropped_and_counted() -> None:
    rows, counts = build([("a", 1, 0, 3)] * 3 + [("b", 1, 0, 3)])
    assert [row["items"] for row in rows] == [[1], [1]]
    assert (counts["duplicates"], counts["events"]) == (2, 2)


def test_an_item_at_several_levels_of_a_request_is_one_event_of_the_highest() -> None:
    [row], counts = build([("a", 1, 0, 2), ("a", 2, 1, 2), ("a", 1, 2, 4), ("a", 1, 3, 3), ("a", 1, 60, 2)])
    assert row["items"] == [1, 2, 1]
    assert row["levels"] == [4, 2, 2]
    assert row["timestamps"] == [0, MINUTE_MS, 60 * MINUTE_MS]
    assert row["requests"] == [0, 0, 1]
    assert counts["merged"] == 2


def test_signals_go_along_with_their_events_and_the_highest_of_a_request_counts() -> None:
    events: list[Event] = [("b", 9, 0, 2), ("a", 1, 5, 2), ("a", 2, 0, 2), ("a", 1, 6, 3), ("a", 1, 6, 3)]
    signals = [[0.0, 7.0], [1.0, 4.0], [None, 5.0], [0.0, 9.0], [0.0, None]]
    config = load_config(overrides=["data.columns.signals={like: is_like, watch: ms}"])
    log = frame(events).with_columns(pl.Series("signals", signals, dtype=pl.List(pl.Float32)))
    table, counts = build_timelines(log, config.data, config.split, NEVER)
    assert table.schema == TIMELINES
    assert table["signals"].to_pylist() == [[None, 5.0, 1.0, 9.0], [0.0, 7.0]]
    assert (counts["events"], counts["merged"]) == (3, 2)


@pytest.mark.parametrize(
    ("levels", "phases"),
    [
        ([2, 2], [TRAIN, TRAIN]),
        ([2, 3, 2], [TRAIN, TRAIN, TRAIN]),
        ([3, 2, 4, 2], [TRAIN, TRAIN, TEST, TEST]),
        ([3, 3, 2, 3], [TRAIN, VALID, VALID, TEST]),
        ([3, 2, 3, 2, 3, 2, 4, 2], [TRAIN, TRAIN, TRAIN, TRAIN, VALID, VALID, TEST, TEST]),
    ],
)
def test_leave_one_out_tests_on_the_last_positive_and_validates_on_the_one_before(levels: list[int], phases: list[Phase]) -> None:
    [row], _ = build([("a", place, place, level) for place, level in enumerate(levels)])
    assert row["phases"] == phases


def test_the_positive_level_is_a_setting() -> None:
    [row], _ = build([("a", place, place, level) for place, level in enumerate([2, 3, 2])], "split.positive_level=2")
    assert row["phases"] == [TRAIN, VALID, TEST]


def utc(text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


@pytest.mark.parametrize(
    ("last", "offset", "valid_from", "test_from"),
    [
        ("2024-03-10T01:00", 0, "2024-03-08T00:00", "2024-03-09T00:00"),
        ("2024-03-10T00:00", 0, "2024-03-08T00:00", "2024-03-09T00:00"),
        ("2024-03-10T01:00", 8, "2024-03-07T16:00", "2024-03-08T16:00"),
        ("2024-03-10T17:00", 8, "2024-03-08T16:00", "2024-03-09T16:00"),
        ("2024-03-10T01:00", -3.5, "2024-03-07T03:30", "2024-03-08T03:30"),
    ],
)
def test_temporal_cuts_fall_on_local_midnights(last: str, offset: float, valid_from: str, test_from: str) -> None:
    split = load_config(overrides=["split.test_days=2", "split.valid_days=1", f"split.utc_offset_hours={offset}"]).split
    assert temporal_cuts(utc(last), split) == Cuts(utc(valid_from), utc(test_from))


def test_a_temporal_phase_begins_at_its_cut() -> None:
    events: list[Event] = [("a", place, minute, 2) for place, minute in enumerate([9, 10, 19, 20, 30])]
    [row], _ = build(events, "split.protocol=temporal", cuts=Cuts(10 * MINUTE_MS, 20 * MINUTE_MS))
    assert row["phases"] == [TRAIN, VALID, VALID, TEST, TEST]


def test_the_order_of_equal_times_tells_nothing_about_the_items() -> None:
    rows, _ = build([(user, item, 0, 3) for user in "ab" for item in range(20)], "data.max_request_items=20")
    orders = [row["items"] for row in rows]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))
    assert orders[0] != list(range(20))
    assert orders[0] != orders[1]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "dé"]),
        st.integers(0, 4),
        st.sampled_from([0, 0, 1, 40, 41, 100]),
        st.integers(1, 4),
        st.sampled_from([None, "x", "y"]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.randoms(use_true_random=False), st.sampled_from(["null", "session"]))
def test_timelines_depend_neither_on_the_order_of_the_log_nor_on_the_sharding(
    events: list[Event], rng: random.Random, request_column: str
) -> None:
    override = f"data.columns.request_id={request_column}"
    whole, counts = build(events, override)
    shuffled = rng.sample(events, len(events))
    assert build(shuffled, override) == (whole, counts)
    by_user = [build([event for event in shuffled if event[0] == user], override) for user in sorted({event[0] for event in events})]
    assert [row for rows, _ in by_user for row in rows] == whole
    assert {name: sum(part[name] for _, part in by_user) for name in counts} == counts


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.integers(1, 3))
def test_a_timeline_keeps_its_promises(events: list[Event], page: int) -> None:
    rows, counts = build(events, f"data.max_request_items={page}")
    assert len(events) == counts["events"] + counts["duplicates"] + counts["merged"]
    for row in rows:
        assert row["timestamps"] == sorted(row["timestamps"])
        assert row["phases"] == sorted(row["phases"])
        assert sorted(set(row["requests"])) == list(range(row["requests"][-1] + 1))
        assert row["requests"] == sorted(row["requests"])
        assert max(row["requests"].count(number) for number in row["requests"]) <= page
