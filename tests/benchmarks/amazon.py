"""Amazon Beauty (2014, 5-core) as a log and a catalogue in the columns that the pipeline reads."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from tests.benchmarks.data import data_folder

_MS_PER_S = 1000


def write_beauty(folder: Path) -> tuple[Path, Path]:
    """Write `events.parquet` and `items.parquet` into a folder, unless they are there.

    Timestamps of the reviews are days, so that many purchases of a user tie. The published sequences fix an order within
    a day (`position`), which the protocol's last two items depend on: a millisecond for each place in the sequence keeps
    it. A day that lies before the one at an earlier place is moved up to it, and the few
    that are missing are taken from their neighbours (31 users have no day at all and get the first one of the set).

    Returns:
        paths of the events and the items.
    """
    source = data_folder("amazon14_beauty")
    events, items = folder / "events.parquet", folder / "items.parquet"
    if not (events.exists() and items.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        beauty_events(pl.read_parquet(source / "interactions.parquet")).write_parquet(events)
        beauty_items(pl.read_parquet(source / "items.parquet")).write_parquet(items)
    return events, items


def beauty_events(interactions: pl.DataFrame) -> pl.DataFrame:
    """Purchases with strictly rising timestamps in ms within a user; level 4 throughout."""
    day = pl.col("timestamp").forward_fill().backward_fill().cum_max().over("user_id").fill_null(pl.col("timestamp").min())
    time = (day * _MS_PER_S + pl.col("position")).alias("timestamp")
    return interactions.sort("user_id", "position").select("user_id", "item_id", time, pl.lit(4, dtype=pl.Int8).alias("level"))


def beauty_items(items: pl.DataFrame) -> pl.DataFrame:
    """Brand and category names as the text of an item; the sources have no titles."""
    return items.select("item_id", pl.col("attributes").list.join(" ").alias("category"))
