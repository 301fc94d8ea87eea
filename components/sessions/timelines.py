"""Checked events to timelines: de-duplicated, cut into requests, labelled with the phases of the protocol."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from infra import records as r
from infra.sections import DataConfig, SplitConfig

_DAY_MS = 86_400_000
_USER = "user"


@dataclass(frozen=True)
class Cuts:
    """Where the phases of the temporal protocol begin, in ms UTC."""

    valid_from: int
    test_from: int


def temporal_cuts(last_ms: int, split: SplitConfig) -> Cuts:
    """The last `test_days` calendar days are TEST, the `valid_days` before them VALID.

    Args:
        last_ms: time of the last event.
        split: days and the offset of the local day from UTC.
    """
    offset = round(split.utc_offset_hours * 3_600_000)
    next_midnight = ((last_ms + offset) // _DAY_MS + 1) * _DAY_MS - offset
    test_from = next_midnight - split.test_days * _DAY_MS
    return Cuts(test_from - split.valid_days * _DAY_MS, test_from)


def build_timelines(events: pl.DataFrame, data: DataConfig, split: SplitConfig, cuts: Cuts) -> tuple[pa.Table, dict[str, int]]:
    """Timelines of the users in `events`.

    Args:
        events: user_id, item_index, request_id, timestamp, level and, where signals are named, those; all events of each user.
        cuts: used by the temporal protocol.

    Returns:
        a TIMELINES table in the order of user ids, and counts: duplicates dropped, repetitions in a request merged to
        their highest level and signals, users with a single event.
    """
    user, signals = r.USER_ID, [f"signal {name}" for name in data.columns.signals]
    # Equal times need an order that does not depend on how the log was sharded, nor tells a model anything: sorted by
    # item, the next item of a tie could be guessed from the last one. Requests stay whole.
    tie = pl.struct(user, r.ITEM_INDEX).hash(seed=0).alias("tie")
    events = events.with_columns(tie, *(pl.col(r.SIGNALS).list.get(at).alias(name) for at, name in enumerate(signals)))
    names = events.select(pl.col(user).unique().sort()).with_row_index(_USER)
    # From here on a user is a number: numbers are compared faster than texts.
    numbered = events.join(names, on=user).drop(user, r.SIGNALS, strict=False)
    unique = numbered.unique([_USER, r.ITEM_INDEX, r.TIMESTAMP, r.LEVEL, r.REQUEST_ID, *signals])
    ordered = unique.sort(_USER, r.TIMESTAMP, r.REQUEST_ID, "tie", r.ITEM_INDEX, r.LEVEL)
    # In order, a flag where something begins and a running sum of the flags are all that grouping takes.
    requests = ordered.with_columns((_new_user() | _new_request(data)).fill_null(value=True).cum_sum().alias("request"))
    pair = (pl.col("request").cast(pl.Int64) * (pl.col(r.ITEM_INDEX).max() + 1) + pl.col(r.ITEM_INDEX)).alias("pair")
    merged = (
        requests.with_columns(pair)
        .with_columns(pl.col(r.LEVEL, *signals).max().over("pair"))
        .unique("pair", keep="first", maintain_order=True)
        .with_columns(_since_start(pl.col("request") != pl.col("request").shift(1)).alias("place"))
    )
    pages = merged.with_columns((pl.col("place") % data.max_request_items == 0).cum_sum().alias("page"))
    number = pl.col("page") - pl.when(_new_user()).then("page").forward_fill()
    labelled = pages.with_columns(number.cast(pl.Int32).alias("request"), _phase(split, cuts).cast(pl.Int8).alias("phase"))
    values = pl.concat_list(signals) if signals else pl.lit(None, pl.List(pl.Float32))
    grouped = (
        labelled.with_columns(values.alias(r.SIGNALS))
        .group_by(_USER, maintain_order=True)
        .agg(
            pl.col(r.ITEM_INDEX).alias("items"),
            pl.col(r.LEVEL).alias("levels"),
            pl.col(r.TIMESTAMP).alias("timestamps"),
            pl.col("request").alias("requests"),
            pl.col("phase").alias("phases"),
            pl.col(r.SIGNALS).explode(),  # lists of lists would be slow to read
        )
        .join(names, on=_USER, maintain_order="left")
        .select(r.TIMELINES.names)
    )
    if not signals:
        grouped = grouped.with_columns(pl.lit(None, pl.List(pl.Float32)).alias(r.SIGNALS))
    counts = {
        "events": len(merged),
        "users": len(grouped),
        "duplicates": len(events) - len(unique),
        "merged": len(unique) - len(merged),
        "users_with_one_event": int((grouped["items"].list.len() == 1).sum()),
    }
    return grouped.to_arrow().cast(r.TIMELINES), counts


def _new_user() -> pl.Expr:
    """True at the first event of each user."""
    return pl.col(_USER).ne_missing(pl.col(_USER).shift(1))


def _new_request(data: DataConfig) -> pl.Expr:
    """True where an event opens a request, if its user has events before it; null at the first event of all."""
    if data.columns.request_id:
        return pl.col(r.REQUEST_ID).ne_missing(pl.col(r.REQUEST_ID).shift(1))
    return pl.col(r.TIMESTAMP) - pl.col(r.TIMESTAMP).shift(1) >= round(data.request_gap_minutes * 60_000)


def _since_start(begins: pl.Expr) -> pl.Expr:
    """How many rows lie between each row and the last one before it where something begins; the first row begins."""
    place = pl.int_range(pl.len())
    return place - pl.when(begins.fill_null(value=True)).then(place).forward_fill()


def _phase(split: SplitConfig, cuts: Cuts) -> pl.Expr:
    if split.protocol == "temporal":
        time = pl.col(r.TIMESTAMP)
        return pl.when(time >= cuts.test_from).then(r.Phase.TEST).when(time >= cuts.valid_from).then(r.Phase.VALID).otherwise(r.Phase.TRAIN)
    # Leave-one-out: TEST begins at the last positive, VALID at the one before it.
    is_positive = pl.col(r.LEVEL) >= split.positive_level
    so_far, in_all = is_positive.cum_sum().over(_USER), is_positive.sum().over(_USER)
    return (
        pl.when((in_all >= 2) & (so_far == in_all))
        .then(r.Phase.TEST)
        .when((in_all >= 3) & (so_far == in_all - 1))
        .then(r.Phase.VALID)
        .otherwise(r.Phase.TRAIN)
    )
