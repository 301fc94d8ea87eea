"""KuaiRand-Pure behind what each user liked before the log begins, in the columns of the log."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from tests.benchmarks.data import data_folder

_MS_BETWEEN = 1000
_SIGNALS = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward")


def write_kuairand_histories(folder: Path) -> tuple[Path, Path]:
    """Write `events.parquet`, the log with the earlier positives before it, into a folder, unless it is there.

    Returns:
        paths of the events and the items.
    """
    source, events = data_folder("kuairand_pure_14d"), folder / "events.parquet"
    if not events.exists():
        folder.mkdir(parents=True, exist_ok=True)
        earlier = pl.read_parquet(source / "prior_positive_histories.parquet")
        half = events.with_suffix(".half")
        with_histories(pl.read_parquet(source / "interactions.parquet"), earlier).write_parquet(half)
        half.replace(events)  # a killed run leaves no file that counts
    return events, source / "items.parquet"


def with_histories(log: pl.DataFrame, earlier: pl.DataFrame) -> pl.DataFrame:
    """The log and, as clicks before it, the earlier positives of each user.

    Only the time of a user's last one is known: the others come a second apart before it. Each is a request of its own.

    Args:
        log: `user_id`, `item_id`, `timestamp_ms`, `session_id` (not negative) and the signals.
        earlier: a row a user: `user_id`, `watch_seq` (items in the order of time) and `last_time_ms`.
    """
    clicks = earlier.select(
        "user_id", "last_time_ms", item_id="watch_seq", ago=pl.col("watch_seq").list.eval(pl.int_range(pl.len()).reverse())
    )
    clicks = clicks.explode("item_id", "ago").drop_nulls("item_id")
    clicks = clicks.select(
        "user_id",
        "item_id",
        timestamp_ms=pl.col("last_time_ms") - pl.col("ago") * _MS_BETWEEN,
        session_id=-1 - pl.col("ago"),
        is_click=pl.lit(1),
    )
    types = {name: log.schema[name] for name in clicks.columns}
    return pl.concat([log, clicks.cast(types)], how="diagonal").with_columns(pl.col(_SIGNALS).fill_null(0))
