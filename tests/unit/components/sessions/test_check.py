"""Raw events are cast and checked one by one; a bad one keeps its reason and its raw row."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.sessions.check import CHECKED, HINTS, MICROSECONDS, NO_TIMESTAMP, SECONDS, check_events, event_columns
from components.sessions.sources import MALFORMED
from infra.config import load_config
from infra.errors import DataError
from infra.sections import DataConfig

NOW_MS = 1_700_000_000_000
GOOD = {"user_id": ["u"], "item_id": ["i"], "timestamp": [NOW_MS], "level": [3]}
BAD_LEVEL = "the level is not one of 1, 2, 3, 4"


def check(columns: dict[str, Any], *settings: str) -> list[dict[str, Any]]:
    checked = check_events(pa.table(columns), load_config(overrides=settings).data)
    assert checked.schema == CHECKED
    return checked.to_pylist()


def test_a_good_event_has_no_reason_and_no_raw_row() -> None:
    good = {"user_id": "u", "item_id": "i", "request_id": None, "timestamp": NOW_MS, "level": 3, "segment": None, "signals": None}
    assert check(GOOD) == [{**good, "reason": None, "raw": None}]


def test_a_segment_of_the_user_is_taken_where_a_column_is_named() -> None:
    assert check({**GOOD, "region": ["north"]}, "data.columns.segment=region")[0]["segment"] == "north"
    assert check({**GOOD, "region": [7]}, "data.columns.segment=region")[0]["segment"] == "7"


@pytest.mark.parametrize(
    ("value", "signal"),
    [
        (True, 1),
        (0, 0),
        (17, 17),
        (2.5, 2.5),
        ("2.5", 2.5),
        (" True ", 1),
        ("no", 0),
        ("", None),
        ("soon", None),
        (None, None),
        (float("inf"), None),
    ],
)
def test_signals_are_numbers_in_the_order_of_their_names_and_a_missing_one_does_no_harm(value: object, signal: float | None) -> None:
    [row] = check({**GOOD, "liked": [1], "seen": [value]}, "data.columns.signals={watch: seen, like: liked}")
    assert (row["signals"], row["reason"]) == ([signal, 1], None)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("user_id", None, "no user id"),
        ("user_id", "", "no user id"),
        ("item_id", None, "no item id"),
        ("item_id", float("nan"), "no item id"),
        ("timestamp", None, NO_TIMESTAMP),
        ("timestamp", "2024-01-02 03:04:05", NO_TIMESTAMP),
        ("timestamp", NOW_MS + 0.5, NO_TIMESTAMP),
        ("timestamp", float("inf"), NO_TIMESTAMP),
        ("timestamp", NOW_MS // 1000, SECONDS),
        ("timestamp", -1, SECONDS),
        ("timestamp", NOW_MS * 1000, MICROSECONDS),
        ("level", 0, BAD_LEVEL),
        ("level", 5, BAD_LEVEL),
        ("level", 300, BAD_LEVEL),
        ("level", None, BAD_LEVEL),
        ("level", 2.5, BAD_LEVEL),
        ("level", "click", BAD_LEVEL),
    ],
)
def test_a_bad_value_is_named_and_the_raw_row_kept(column: str, value: object, reason: str) -> None:
    [row] = check({**GOOD, column: [value]})
    assert row["reason"] == reason
    assert list(json.loads(row["raw"])) == list(GOOD)


def test_hints_name_the_setting_for_other_units() -> None:
    assert HINTS[SECONDS] == "--set data.timestamp_unit=s"
    assert HINTS[MICROSECONDS] == "--set data.timestamp_unit=us"


@pytest.mark.parametrize(
    ("unit", "value"),
    [
        ("ms", str(NOW_MS)),
        ("ms", f" {NOW_MS}.0 "),
        ("ms", float(NOW_MS)),
        ("ms", datetime.fromtimestamp(NOW_MS / 1000, UTC)),
        ("s", NOW_MS // 1000),
        ("s", str(NOW_MS // 1000)),
        ("us", NOW_MS * 1000),
    ],
)
def test_timestamps_of_every_unit_and_type_become_milliseconds(unit: str, value: object) -> None:
    [row] = check({**GOOD, "timestamp": [value]}, f"data.timestamp_unit={unit}")
    assert (row["timestamp"], row["reason"]) == (NOW_MS, None)


def test_seconds_may_have_a_fraction() -> None:
    rows = check({**GOOD, "timestamp": [1_700_000_000.123]}, "data.timestamp_unit=s")
    assert rows[0]["timestamp"] == 1_700_000_000_123


def test_a_date_is_its_midnight() -> None:
    assert check({**GOOD, "timestamp": [date(2024, 1, 1)]})[0]["timestamp"] == 1_704_067_200_000


@pytest.mark.parametrize("level", ["3", "3.0", 3.0])
def test_levels_may_come_as_text_or_float(level: object) -> None:
    assert check({**GOOD, "level": [level]})[0]["level"] == 3


def test_ids_of_a_float_column_are_the_integers_they_stand_for() -> None:
    rows = check({"user_id": [1.0, None, 1.5], "item_id": [7, 7, 7], "timestamp": [NOW_MS] * 3, "level": [3] * 3})
    assert [(row["user_id"], row["item_id"], row["reason"]) for row in rows] == [
        ("1", "7", None),
        (None, "7", "no user id"),
        (None, "7", "no user id"),
    ]


def test_a_log_without_levels_gets_the_default_level() -> None:
    columns = {name: values for name, values in GOOD.items() if name != "level"}
    assert check(columns, "data.columns.level=null", "data.default_level=3")[0]["level"] == 3


@pytest.mark.parametrize(
    ("flags", "truths"),
    [
        ([True, False, None], [True, False, False]),
        ([1, 0, None, -1, 2], [True, False, False, False, True]),
        ([1.0, 0.0, float("nan"), None], [True, False, False, False]),
        (
            ["1", "0", "true", "False", "", None, "no", "yes", "0.0", "nan", "None", " TRUE "],
            [True, False, True, False, False, False, False, True, False, False, False, True],
        ),
    ],
)
def test_a_level_rule_holds_where_its_flag_is_truthy(flags: list[object], truths: list[bool]) -> None:
    count = len(flags)
    columns = {"user_id": ["u"] * count, "item_id": ["i"] * count, "timestamp": [NOW_MS] * count, "is_like": flags}
    rows = check(columns, "data.level_rules={4: [is_like]}")
    assert [row["level"] for row in rows] == [4 if truth else 2 for truth in truths]


def test_the_highest_level_whose_rule_holds_wins() -> None:
    flags = {"is_like": [1, 0, 0, 0], "is_follow": [0, 1, 0, 0], "is_click": [1, 1, 1, 0]}
    columns = {"user_id": ["u"] * 4, "item_id": ["i"] * 4, "timestamp": [NOW_MS] * 4, **flags}
    rows = check(columns, "data.level_rules={3: [is_click], 4: [is_like, is_follow]}")
    assert [row["level"] for row in rows] == [4, 4, 3, 2]


def test_a_line_that_could_not_be_parsed_is_kept_as_it_was() -> None:
    nothing = pa.nulls(1, pa.string())
    [row] = check({**dict.fromkeys(GOOD, nothing), MALFORMED: ["u,i,"]})
    assert row["reason"] == "the line cannot be parsed"
    assert json.loads(row["raw"]) == {"line": "u,i,"}


def test_only_the_columns_that_are_needed_are_asked_for() -> None:
    plain = load_config(overrides=["data.columns.request_id=session"]).data
    assert event_columns(plain) == {
        "user_id": "user_id",
        "item_id": "item_id",
        "timestamp": "timestamp",
        "request_id": "session",
        "level": "level",
    }
    ruled = load_config(overrides=["data.level_rules={4: [is_like]}"]).data
    assert set(event_columns(ruled).values()) == {"user_id", "item_id", "timestamp", "is_like"}


@given(st.lists(st.tuples(st.none() | st.integers(-(2**62), 2**62), st.none() | st.integers(-9, 9)), max_size=20))
def test_no_row_is_lost_and_good_ones_hold_what_the_schema_promises(rows: list[tuple[int | None, int | None]]) -> None:
    times, levels = [time for time, _ in rows], [level for _, level in rows]
    checked = check(
        {
            "user_id": pa.array(["u"] * len(rows), pa.string()),
            "item_id": pa.array(["i"] * len(rows), pa.string()),
            "timestamp": pa.array(times, pa.int64()),
            "level": pa.array(levels, pa.int64()),
        }
    )
    assert len(checked) == len(rows)
    for (time, level), row in zip(rows, checked, strict=True):
        good = time is not None and 631_152_000_000 <= time <= 4_102_444_800_000 and level in (1, 2, 3, 4)
        assert (row["reason"] is None) == good == (row["raw"] is None)
        assert not good or (row["timestamp"], row["level"]) == (time, level)


@pytest.mark.parametrize("column", ["user_id", "level", "timestamp"])
def test_a_column_of_lists_is_refused_with_its_type(column):
    rows = {"user_id": ["u"], "item_id": ["i"], "timestamp": [1_700_000_000_000], "level": [3]}
    batch = pa.table({name: [values] if name == column else values for name, values in rows.items()})
    with pytest.raises(DataError, match="wrong type") as caught:
        check_events(batch, DataConfig(logs="log.parquet"))
    assert f"{column}: list" in caught.value.where


def test_categories_of_pandas_are_read_as_text():
    words = pa.array(["u", "u"]).dictionary_encode()
    batch = pa.table({"user_id": words, "item_id": words, "timestamp": [1_700_000_000_000] * 2, "level": [3, 4]})
    assert check_events(batch, DataConfig())["user_id"].to_pylist() == ["u", "u"]
