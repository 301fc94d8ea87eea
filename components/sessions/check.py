"""Check raw events one by one: good rows in the EVENTS schema, bad ones with the reason, nothing dropped in silence."""

from __future__ import annotations

import json

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from components.sessions.sources import MALFORMED, ids_as_text, whole_numbers
from infra import records as r
from infra.errors import DataError
from infra.sections import DataConfig

_MS_PER_UNIT = {"s": 1000.0, "us": 0.001}
_EARLIEST_MS = 631_152_000_000  # 1990-01-01
_LATEST_MS = 4_102_444_800_000  # 2100-01-01
SECONDS = "the timestamp lies before 1990: are these seconds?"
MICROSECONDS = "the timestamp lies after 2100: are these microseconds?"
NO_TIMESTAMP = "the timestamp is no whole number"
HINTS = {
    SECONDS: "--set data.timestamp_unit=s",
    MICROSECONDS: "--set data.timestamp_unit=us",
    NO_TIMESTAMP: "write timestamps as integers or as a Parquet datetime column",
}

CHECKED = pa.schema([*(f.with_nullable(True) for f in r.EVENTS), pa.field(r.REASON, pa.string()), pa.field(r.RAW, pa.string())])


def event_columns(data: DataConfig) -> dict[str, str]:
    """Setting -> column for all columns of the log that are needed."""
    columns = data.columns
    wanted = {"user_id": columns.user_id, "item_id": columns.item_id, "timestamp": columns.timestamp}
    if columns.request_id:
        wanted["request_id"] = columns.request_id
    if columns.segment:
        wanted["segment"] = columns.segment
    wanted |= {f"signals ({name})": column for name, column in columns.signals.items()}
    if data.level_rules:
        wanted |= {f"level_rules ({name})": name for names in data.level_rules.values() for name in names}
    elif columns.level:
        wanted["level"] = columns.level
    return wanted


def check_events(batch: pa.Table, data: DataConfig) -> pa.Table:
    """Cast and check a batch of raw events.

    Returns:
        a CHECKED table: `reason` is null for a good row; a bad one has the reason and the raw row as JSON.

    Raises:
        DataError: a column of a type that cannot hold what it is mapped to, such as a list of user ids.
    """
    try:
        return _check(batch, data)
    except (pl.exceptions.PolarsError, TypeError) as error:
        types = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)
        raise DataError(
            f"a column has a wrong type: {str(error).partition(chr(10))[0]}", where=f"{data.logs} has {types}", mend="see data.columns"
        ) from error


def _check(batch: pa.Table, data: DataConfig) -> pa.Table:
    raw = pl.DataFrame(pl.from_arrow(batch)).with_columns(cs.categorical().cast(pl.String), cs.enum().cast(pl.String))
    columns = data.columns
    malformed = raw[MALFORMED] if MALFORMED in raw.columns else pl.repeat(None, len(raw), dtype=pl.String, eager=True)
    nothing = pl.repeat(None, len(raw), dtype=pl.String, eager=True)
    frame = pl.DataFrame(
        {
            r.USER_ID: ids_as_text(raw[columns.user_id]),
            r.ITEM_ID: ids_as_text(raw[columns.item_id]),
            r.REQUEST_ID: ids_as_text(raw[columns.request_id]) if columns.request_id else nothing,
            r.TIMESTAMP: _milliseconds(raw[columns.timestamp], data.timestamp_unit),
            r.LEVEL: _level(raw, data),
            r.SEGMENT: ids_as_text(raw[columns.segment]) if columns.segment else nothing,
            r.SIGNALS: _signals(raw, list(columns.signals.values())),
            MALFORMED: malformed,
        }
    )
    time = pl.col(r.TIMESTAMP)
    reason = (
        pl.when(pl.col(MALFORMED).is_not_null())
        .then(pl.lit("the line cannot be parsed"))
        .when(pl.col(r.USER_ID).is_null() | (pl.col(r.USER_ID) == ""))
        .then(pl.lit("no user id"))
        .when(pl.col(r.ITEM_ID).is_null() | (pl.col(r.ITEM_ID) == ""))
        .then(pl.lit("no item id"))
        .when(time.is_null())
        .then(pl.lit(NO_TIMESTAMP))
        .when(time < _EARLIEST_MS)
        .then(pl.lit(SECONDS))
        .when(time > _LATEST_MS)
        .then(pl.lit(MICROSECONDS))
        .when(pl.col(r.LEVEL).is_null() | ~pl.col(r.LEVEL).is_between(1, 4))
        .then(pl.lit("the level is not one of 1, 2, 3, 4"))
        .otherwise(None)
    )
    frame = frame.with_columns(reason.alias(r.REASON))
    frame = frame.with_columns(_as_json(raw, frame[r.REASON].is_not_null()).alias(r.RAW))
    # A bad level may not fit int8: it is only kept in `raw`.
    frame = frame.with_columns(pl.when(pl.col(r.REASON).is_null()).then(pl.col(r.LEVEL)).cast(pl.Int8))
    return frame.select(CHECKED.names).to_arrow().cast(CHECKED)


def _as_json(frame: pl.DataFrame, wanted: pl.Series) -> pl.Series:
    """Some rows as JSON, null for the others."""
    texts = []
    for row in frame.filter(wanted).iter_rows(named=True):
        line = row.pop(MALFORMED, None)
        texts.append(json.dumps(row if line is None else {"line": line}, default=str))
    rows = pl.repeat(None, len(frame), dtype=pl.String, eager=True)
    return rows.scatter(wanted.arg_true(), texts) if texts else rows


def _milliseconds(raw: pl.Series, unit: str) -> pl.Series:
    if isinstance(raw.dtype, pl.Datetime | pl.Date):
        return raw.dt.epoch("ms")
    if unit == "ms":
        return whole_numbers(raw)
    numbers = raw.str.strip_chars() if raw.dtype == pl.String else raw
    scaled = numbers.cast(pl.Float64, strict=False) * _MS_PER_UNIT[unit]  # seconds may have a fraction
    return scaled.round().cast(pl.Int64, strict=False)


def _level(raw: pl.DataFrame, data: DataConfig) -> pl.Series:
    if data.level_rules:
        chain: pl.Expr = pl.lit(data.default_level)
        for level in sorted(data.level_rules):
            holds = pl.any_horizontal([_truthy(name, raw.schema[name]) for name in data.level_rules[level]])
            chain = pl.when(holds).then(pl.lit(level)).otherwise(chain)
        return raw.select(chain.cast(pl.Int64).alias(r.LEVEL)).to_series()
    if not data.columns.level:
        return pl.Series(r.LEVEL, [data.default_level] * len(raw), dtype=pl.Int64)
    return whole_numbers(raw[data.columns.level])


def _signals(raw: pl.DataFrame, columns: list[str]) -> pl.Series:
    """The values of each row as a list; null where a value is missing or no number, since a signal may be missing of a good event."""
    if not columns:
        return pl.repeat(None, len(raw), dtype=pl.List(pl.Float32), eager=True).alias(r.SIGNALS)
    return raw.select(pl.concat_list([_number(name, raw.schema[name]) for name in columns]).alias(r.SIGNALS)).to_series()


def _number(name: str, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if dtype == pl.String:
        text = column.str.strip_chars().str.to_lowercase()
        flags = {"true": "1", "yes": "1", "false": "0", "no": "0"}
        column = text.replace(flags)
    value = column.cast(pl.Float32, strict=False)
    return pl.when(value.is_finite()).then(value)


def _truthy(name: str, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if dtype == pl.Boolean:
        return column.fill_null(value=False)
    if dtype == pl.String:
        text = column.fill_null("").str.strip_chars().str.to_lowercase()
        number = text.cast(pl.Float64, strict=False)
        no = ["", "false", "no", "null", "none"]
        return pl.when(number.is_null()).then(~text.is_in(no)).otherwise((number > 0) & number.is_not_nan())
    if dtype.is_float():
        column = column.fill_nan(None)
    return column.fill_null(0) > 0
