"""What a user liked before the log begins stands before it, in order, as clicks."""

import polars as pl
import pytest

from tests.benchmarks.kuairand import with_histories

SIGNALS = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward")
LOG = pl.DataFrame(
    {
        "user_id": [1, 2],
        "item_id": [50, 60],
        "timestamp_ms": [900_000, 900_000],
        "session_id": [0, 0],
        **{name: [0, 1] for name in SIGNALS},
    },
    schema_overrides={"user_id": pl.Int32, "item_id": pl.Int32, "session_id": pl.Int32, "is_click": pl.Int8},
)


@pytest.fixture
def events() -> pl.DataFrame:
    earlier = pl.DataFrame({"user_id": [1, 3], "watch_seq": [[7, 8, 7], []], "last_time_ms": [500_000, 600_000]})
    return with_histories(LOG, earlier)


def test_earlier_positives_come_before_the_log_in_their_order(events: pl.DataFrame) -> None:
    own = events.filter(pl.col("user_id") == 1).sort("timestamp_ms")
    assert own["item_id"].to_list() == [7, 8, 7, 50]
    assert own["timestamp_ms"].to_list() == [498_000, 499_000, 500_000, 900_000]


def test_earlier_positives_are_clicks_of_requests_of_their_own(events: pl.DataFrame) -> None:
    earlier = events.filter(pl.col("timestamp_ms") < 900_000)
    assert earlier.select(SIGNALS).unique().to_dicts() == [dict.fromkeys(SIGNALS, 0) | {"is_click": 1}]
    assert len(set(earlier["session_id"]) | {0}) == 4


def test_the_log_itself_is_as_it_was(events: pl.DataFrame) -> None:
    assert events.filter(pl.col("timestamp_ms") == 900_000).equals(LOG)
