"""Check raw events one by one: good rows in the EVENTS schema, bad ones with the reason, nothing dropped in silence."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pyarrow as pa

from infra import records as r
from infra.config import DataConfig

_MS_PER_UNIT = {"ms": 1.0, "s": 1000.0, "us": 0.001}
_EARLIEST_MS = 631_152_000_000  # 1990-01-01
_LATEST_MS = 4_102_444_800_000  # 2100-01-01
SECONDS = "the timestamp lies before 1990: are these seconds?"
HINTS = {SECONDS: "--set data.timestamp_unit=s"}

CHECKED = pa.schema([*(f.with_nullable(True) for f in r.EVENTS), pa.field(r.REASON, pa.string()), pa.field(r.RAW, pa.string())])


def event_columns(data: DataConfig) -> dict[str, str]:
    """Setting -> column for all columns of the log that are needed."""
    columns = data.columns
    wanted = {"user_id": columns.user_id, "item_id": columns.item_id, "timestamp": columns.timestamp}
    if columns.request_id:
        wanted["request_id"] = columns.request_id
    if data.level_rules:
        wanted |= {f"level_rules ({name})": name for names in data.level_rules.values() for name in names}
    elif columns.level:
        wanted["level"] = columns.level
    return wanted


def check_events(batch: pa.Table, data: DataConfig) -> pa.Table:
    """Cast and check a batch of raw events.

    Returns:
        a CHECKED table: `reason` is null for a good row; a bad one has the reason and the raw row as JSON.
    """
    raw = pl.DataFrame(pl.from_arrow(batch))
    columns = data.columns
    timestamp = _milliseconds(raw[columns.timestamp], data.timestamp_unit)
    level = _level(raw, data)
    frame = pl.DataFrame(
        {
            r.USER_ID: raw[columns.user_id].cast(pl.String, strict=False),
            r.ITEM_ID: raw[columns.item_id].cast(pl.String, strict=False),
            r.REQUEST_ID: raw[columns.request_id].cast(pl.String, strict=False)
            if columns.request_id
            else pl.Series([None] * len(raw), dtype=pl.String),
            r.TIMESTAMP: timestamp,
            r.LEVEL: level,
        }
    )
    time = pl.col(r.TIMESTAMP)
    reason = (
        pl.when(pl.col(r.USER_ID).is_null() | (pl.col(r.USER_ID) == ""))
        .then(pl.lit("no user id"))
        .when(pl.col(r.ITEM_ID).is_null() | (pl.col(r.ITEM_ID) == ""))
        .then(pl.lit("no item id"))
        .when(time.is_null())
        .then(pl.lit("the timestamp is no integer"))
        .when(time < _EARLIEST_MS)
        .then(pl.lit(SECONDS))
        .when(time > _LATEST_MS)
        .then(pl.lit("the timestamp lies after 2100: are these microseconds?"))
        .when(pl.col(r.LEVEL).is_null() | ~pl.col(r.LEVEL).is_between(1, 4))
        .then(pl.lit("the level is not one of 1, 2, 3, 4"))
        .otherwise(None)
    )
    frame = frame.with_columns(reason.alias(r.REASON))
    bad = frame[r.REASON].is_not_null()
    as_json = [json.dumps(row, default=str) if is_bad else None for row, is_bad in zip(_rows_where(raw, bad), bad, strict=True)]
    frame = frame.with_columns(pl.Series(r.RAW, as_json, dtype=pl.String))
    # A bad level may not fit int8: it is only kept in `raw`.
    frame = frame.with_columns(pl.when(pl.col(r.REASON).is_null()).then(pl.col(r.LEVEL)).cast(pl.Int8))
    return frame.to_arrow().cast(CHECKED)


def _rows_where(frame: pl.DataFrame, wanted: pl.Series) -> list[dict[str, object] | None]:
    rows: list[dict[str, object] | None] = [None] * len(frame)
    for index, row in zip(np.flatnonzero(wanted.to_numpy()), frame.filter(wanted).iter_rows(named=True), strict=True):
        rows[int(index)] = row
    return rows


def _milliseconds(raw: pl.Series, unit: str) -> pl.Series:
    if isinstance(raw.dtype, pl.Datetime):
        return raw.dt.epoch("ms")
    numbers = raw.cast(pl.Float64, strict=False) if not raw.dtype.is_integer() else raw
    if numbers.dtype.is_float():
        numbers = pl.select(pl.when(numbers.is_finite() & (numbers == numbers.floor())).then(numbers)).to_series()
    if unit == "ms":
        return numbers.cast(pl.Int64, strict=False)
    return (numbers * _MS_PER_UNIT[unit]).cast(pl.Int64, strict=False)


def _level(raw: pl.DataFrame, data: DataConfig) -> pl.Series:
    if data.level_rules:
        chain: pl.Expr = pl.lit(data.default_level)
        for level in sorted(data.level_rules):
            holds = pl.any_horizontal([_truthy(name, raw.schema[name]) for name in data.level_rules[level]])
            chain = pl.when(holds).then(pl.lit(level)).otherwise(chain)
        return raw.select(chain.cast(pl.Int64).alias(r.LEVEL)).to_series()
    if not data.columns.level:
        return pl.Series(r.LEVEL, [data.default_level] * len(raw), dtype=pl.Int64)
    given = raw[data.columns.level]
    if given.dtype.is_float():
        given = pl.select(pl.when(given == given.floor()).then(given)).to_series()
    return given.cast(pl.Int64, strict=False)


def _truthy(name: str, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if dtype == pl.Boolean:
        return column.fill_null(value=False)
    if dtype == pl.String:
        return ~column.fill_null("").str.to_lowercase().is_in(["", "0", "false", "no"])
    return column.fill_null(0) > 0
