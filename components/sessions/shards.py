"""A log to timelines in two passes over Ray: checked events go to the shard of their user, then each shard becomes timelines.

Between the passes the events lie as Parquet beside the output. No worker holds more than some rows of the log, or one
shard, and what is exchanged needs no memory of the cluster.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from components.sessions.check import check_events, event_columns
from components.sessions.sources import Piece, pieces_of, read_piece
from components.sessions.timelines import Cuts, build_timelines
from infra import records as r
from infra import storage
from infra.config import Config
from infra.errors import DataError
from infra.logs import ProgressMeter, get_logger
from infra.sections import DataConfig, SplitConfig

NO_EVENTS, NO_EVENTS_MEND = "the log holds no events", "check --logs and the export behind it"
QUARANTINE_FOLDER = "quarantine"
_SHARD = "shard"
_EXCHANGED = (r.USER_ID, r.ITEM_ID, r.REQUEST_ID, r.TIMESTAMP, r.LEVEL, r.SIGNALS)
_ROWS_AT_ONCE = 500_000
_MOST_SEGMENTS, _SEGMENT_ITEMS = 1000, 500


@dataclass
class Summary:
    """What the first pass found.

    Attributes:
        rows: of the log.
        bad: quarantined ones by reason.
        items: ids that occur.
        last_ms: time of the last good event.
        segments: (segment, item) with the number of positive events, a frame a part of the log.
        shards: numbers of those that have events.
    """

    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    items: set[str] = field(default_factory=set)
    last_ms: int = 0
    segments: list[pl.DataFrame] = field(default_factory=list)
    shards: set[int] = field(default_factory=set)

    def add(self, frame: pl.DataFrame, positive_level: int) -> None:
        """Count checked events."""
        self.rows += len(frame)
        good = frame
        if frame[r.REASON].null_count() < len(frame):
            self.bad.update(dict(frame[r.REASON].drop_nulls().value_counts().iter_rows()))
            good = frame.filter(pl.col(r.REASON).is_null())
        self.items.update(good[r.ITEM_ID].unique())
        last = good[r.TIMESTAMP].max()
        self.last_ms = max(self.last_ms, int(last) if isinstance(last, int) else 0)
        if good[r.SEGMENT].null_count() < len(good):
            named = good.filter(pl.col(r.LEVEL) >= positive_level, pl.col(r.SEGMENT).fill_null("") != "")
            self.segments.append(named.group_by(r.SEGMENT, r.ITEM_ID).agg(pl.len().cast(pl.Int64).alias(r.POPULARITY)))

    def to_arrow(self) -> pa.Table:
        """As one row."""
        segments = [row for frame in self.segments for row in frame.iter_rows()]
        columns = {
            "rows": pa.array([self.rows], pa.int64()),
            "last_ms": pa.array([self.last_ms], pa.int64()),
            "items": pa.array([list(self.items)], pa.list_(pa.string())),
            "reasons": pa.array([list(self.bad)], pa.list_(pa.string())),
            "counts": pa.array([list(self.bad.values())], pa.list_(pa.int64())),
            "shards": pa.array([list(self.shards)], pa.list_(pa.int64())),
        }
        types = {r.SEGMENT: pa.string(), r.ITEM_ID: pa.string(), r.POPULARITY: pa.int64()}
        lists = {name: pa.array([[row[at] for row in segments]], pa.list_(kind)) for at, (name, kind) in enumerate(types.items())}
        return pa.table(columns | lists)

    def take(self, row: dict[str, Any]) -> None:
        """Add what another one found, as a row of `to_arrow`."""
        self.rows += row["rows"]
        self.last_ms = max(self.last_ms, row["last_ms"])
        self.items.update(row["items"])
        self.bad.update(dict(zip(row["reasons"], row["counts"], strict=True)))
        self.shards.update(map(int, row["shards"]))
        if len(row[r.SEGMENT]):
            self.segments.append(pl.DataFrame({name: list(row[name]) for name in (r.SEGMENT, r.ITEM_ID, r.POPULARITY)}))


def split_log(data: DataConfig, positive_level: int, scratch_uri: str) -> Summary:
    """Check all events, and write each beside those of its user: `shard-*/` and, for bad ones, `quarantine/` below `scratch_uri`.

    Needs a Ray connection.

    Raises:
        DataError: no events at all, or files that cannot be read.
    """
    import ray.data

    pieces = pieces_of(data.logs)
    if not pieces:  # Parquet without a row group
        raise DataError(NO_EVENTS, where=data.logs, mend=NO_EVENTS_MEND)
    rows = ray.data.from_items([{**asdict(piece), "number": n} for n, piece in enumerate(pieces)], override_num_blocks=len(pieces))
    work = partial(_split_pieces, data=data, positive_level=positive_level, scratch_uri=scratch_uri)
    summary = Summary()
    for part in rows.map_batches(work, batch_format="pyarrow", batch_size=1).iter_rows():
        summary.take(part)
    return summary


def _split_pieces(batch: pa.Table, data: DataConfig, positive_level: int, scratch_uri: str) -> Iterator[pa.Table]:
    """Write the events of pieces to their shards, and yield what was found; a generator, of which Ray keeps the cause of an error."""
    columns = list(dict.fromkeys(event_columns(data).values()))
    for row in batch.to_pylist():
        number, found, kept, rows = row.pop("number"), Summary(), list[pl.DataFrame](), 0
        for place, table in enumerate(read_piece(Piece(**row), columns, uri=data.logs)):
            frame = pl.DataFrame(pl.from_arrow(check_events(table, data)))
            found.add(frame, positive_level)
            is_bad = frame[r.REASON].is_not_null()
            if is_bad.any():
                bad = frame.filter(is_bad).select(pl.lit("events").alias("source"), r.REASON, r.RAW)
                name = f"{number:06d}-{place:04d}.parquet"
                storage.write_table(bad.to_arrow().cast(r.QUARANTINE), storage.join(scratch_uri, QUARANTINE_FOLDER, name))
            kept.append(frame.filter(~is_bad).select(_EXCHANGED))
            rows += len(kept[-1])
            if rows >= _ROWS_AT_ONCE:
                found.shards |= _write_parts(pl.concat(kept), data.shards, scratch_uri, f"{number:06d}-{place:04d}")
                kept, rows = [], 0
        if rows:
            found.shards |= _write_parts(pl.concat(kept), data.shards, scratch_uri, f"{number:06d}-last")
        yield found.to_arrow()


def _write_parts(events: pl.DataFrame, shards: int, scratch_uri: str, name: str) -> set[int]:
    """Write events to their shards; the numbers of those."""
    users = events.select(pl.col(r.USER_ID).unique())
    shard = pl.Series(_SHARD, [zlib.crc32(user.encode()) % shards for user in users[r.USER_ID]], dtype=pl.Int32)
    with_shard = events.join(users.with_columns(shard), on=r.USER_ID)
    parts = {int(number): part for (number,), part in with_shard.partition_by(_SHARD, as_dict=True, include_key=False).items()}
    for number, part in parts.items():
        storage.write_table(part.to_arrow(), storage.join(_shard_uri(scratch_uri, number), f"{name}.parquet"))
    return set(parts)


def _shard_uri(scratch_uri: str, number: Any) -> str:
    return storage.join(scratch_uri, f"shard-{number:05d}")


def write_timelines(
    scratch_uri: str, numbers: Sequence[int], catalogue: pl.DataFrame, config: Config, cuts: Cuts, uri: str
) -> tuple[np.ndarray, dict[str, int]]:
    """Write `part-*.parquet` below `uri`, a file a shard.

    Args:
        scratch_uri: of `split_log`.
        numbers: of the shards that it wrote; one that is gone is an error.
        catalogue: numbers of the items.
        config: `data` and `split` are used.
        cuts: used by the temporal protocol.
        uri: where the timelines go.

    Returns:
        training popularity of each item, and the counts of `build_timelines` over all shards.
    """
    import ray
    import ray.data

    n_items = len(catalogue)
    index = ray.put(catalogue.select(r.ITEM_ID, r.ITEM_INDEX).to_arrow())
    work = partial(_write_shards, data=config.data, split=config.split, cuts=cuts, index=index, scratch_uri=scratch_uri, uri=uri)
    rows = ray.data.from_items([{_SHARD: n} for n in numbers], override_num_blocks=len(numbers))
    popularity, counts = np.zeros(n_items, dtype=np.int64), Counter[str]()
    meter = ProgressMeter(len(numbers), step="sessions", unit="shards")
    for part in rows.map_batches(work, batch_format="pyarrow", batch_size=1).iter_rows():
        popularity += np.asarray(part.pop(r.POPULARITY), dtype=np.int64)
        counts.update(part)
        meter.advance()
    meter.close()
    return popularity, dict(counts)


def _write_shards(
    batch: pa.Table, data: DataConfig, split: SplitConfig, cuts: Cuts, index: Any, scratch_uri: str, uri: str
) -> Iterator[pa.Table]:
    """Write the timelines of shards, and yield their counts."""
    import ray

    items = pl.DataFrame(pl.from_arrow(ray.get(index)))
    for number in batch[_SHARD].to_pylist():
        events = pl.DataFrame(pl.from_arrow(storage.read_table(_shard_uri(scratch_uri, number))))
        indexed = events.join(items, on=r.ITEM_ID, how="inner").drop(r.ITEM_ID)
        table, counts = build_timelines(indexed, data, split, cuts)
        storage.write_table(table, storage.join(uri, f"part-{number:05d}.parquet"))
        popularity = train_popularity(table, len(items), split.positive_level).tolist()
        yield pa.Table.from_pylist([{**counts, r.POPULARITY: popularity}])


def train_popularity(timelines: pa.Table, n_items: int, positive_level: int) -> np.ndarray:
    """Positive events of each item in the training phase, int64 [n_items]."""
    flat = {name: timelines[name].combine_chunks().flatten().to_numpy() for name in ("items", "levels", "phases")}
    counted = (flat["levels"] >= positive_level) & (flat["phases"] == r.Phase.TRAIN)
    return np.bincount(flat["items"][counted], minlength=n_items)


def largest_segments(found: list[pl.DataFrame]) -> dict[str, dict[str, int]]:
    """Segment -> positive events of its most popular items, of all phases: nothing is judged by them."""
    if not found:
        return {}
    counts = pl.concat(found).group_by(r.SEGMENT, r.ITEM_ID).agg(pl.col(r.POPULARITY).sum())
    sizes = counts.group_by(r.SEGMENT).agg(pl.col(r.POPULARITY).sum()).sort(r.POPULARITY, r.SEGMENT, descending=True)
    if len(sizes) > _MOST_SEGMENTS:
        get_logger("sessions").warning("only the largest segments are kept", kept=_MOST_SEGMENTS, left_out=len(sizes) - _MOST_SEGMENTS)
    best = counts.sort(r.POPULARITY, r.ITEM_ID, descending=[True, False]).group_by(r.SEGMENT, maintain_order=True).head(_SEGMENT_ITEMS)
    kept = best.join(sizes.head(_MOST_SEGMENTS).select(r.SEGMENT), on=r.SEGMENT)
    segments: dict[str, dict[str, int]] = {}
    for segment, item_id, popularity in kept.select(r.SEGMENT, r.ITEM_ID, r.POPULARITY).iter_rows():
        segments.setdefault(segment, {})[item_id] = popularity
    return segments
