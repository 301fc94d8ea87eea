"""Raw logs to timelines and catalogue, sharded over Ray (`python -m components.sessions.job`)."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from components.sessions.catalogue import build_catalogue, catalogue_table, check_items
from components.sessions.check import HINTS, check_events, event_columns
from components.sessions.sources import Piece, columns_by_file, data_files, pieces_of, read_piece, require_columns
from components.sessions.timelines import Cuts, build_timelines, temporal_cuts
from infra import records as r
from infra import storage
from infra.cluster import quiet_ray, ray_session, unwrap
from infra.config import Config
from infra.errors import DataError, RankGRError
from infra.logs import ProgressMeter, get_logger
from infra.sections import DataConfig, SplitConfig
from infra.steps import Run, StepResult, job_main, run_step

if TYPE_CHECKING:
    import ray.data

STEP = "sessions"
CODE = ("components/sessions", "infra/records.py")
CATALOGUE_FILE = "catalogue.parquet"
TIMELINES_FOLDER = "timelines"
_SHARD = "shard"
_MOST_SEGMENTS, _SEGMENT_ITEMS = 1000, 500
_NO_EVENTS, _NO_EVENTS_MEND = "the log holds no events", "check --logs and the export behind it"


def prepare_sessions(config: Config, out_uri: str) -> dict[str, Any]:
    """Write `timelines/part-*.parquet`, `catalogue.parquet` and `quarantine/` below `out_uri`.

    Needs a Ray connection.

    Returns:
        counts: events, users, items, quarantined rows by reason, duplicates, and the protocol's cuts.

    Raises:
        DataError: missing columns, unreadable files, more than `max_bad_fraction` bad rows, nothing left.
        StorageError: `out_uri` cannot be written.
    """
    import ray.data  # noqa: F401 - sets its loggers up, so it comes before they are silenced

    quiet_ray(errors_too=True)
    with _errors_of_tasks():
        return _prepare_sessions(config, out_uri)


@contextmanager
def _errors_of_tasks() -> Iterator[None]:
    """Raise an error of ours as what it is, rather than wrapped by Ray."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        ours = unwrap(error)
        if isinstance(ours, RankGRError):
            raise ours from None
        raise


def _prepare_sessions(config: Config, out_uri: str) -> dict[str, Any]:
    checked = _checked_events(config.data)
    summary = _summarise(checked)
    if summary.rows == 0:
        raise DataError(_NO_EVENTS, where=config.data.logs, mend=_NO_EVENTS_MEND)
    quarantine_uri = storage.join(out_uri, "quarantine")
    if summary.bad:
        _write_quarantine(checked, quarantine_uri)
    _refuse_too_many_bad(summary.bad, summary.rows, "events", config.data, where=f"{config.data.logs}; they are in {quarantine_uri}")
    catalogue, bad_items, item_counts = build_catalogue(config.data, summary.items)
    if len(bad_items):
        storage.write_table(bad_items.to_arrow().cast(r.QUARANTINE), storage.join(quarantine_uri, "items.parquet"))
        rows = len(bad_items) + item_counts["items"] - item_counts["items_without_features"]
        reasons_of_items = Counter[str](bad_items[r.REASON].to_list())
        _refuse_too_many_bad(reasons_of_items, rows, "items", config.data, where=f"{config.data.items}; they are in {quarantine_uri}")
    cuts = temporal_cuts(summary.last_ms, config.split)
    popularity, counts = _write_timelines(checked, catalogue, config, cuts, storage.join(out_uri, TIMELINES_FOLDER))
    segments = _segments(checked, config.split.positive_level) if config.data.columns.segment else {}
    storage.write_table(catalogue_table(catalogue, popularity.tolist(), segments), storage.join(out_uri, CATALOGUE_FILE))
    reasons = dict(summary.bad)
    if summary.bad or len(bad_items):
        get_logger(STEP).warning("rows were quarantined", events=sum(summary.bad.values()), items=len(bad_items), where=quarantine_uri)
    return {
        "raw_rows": summary.rows,
        "quarantined": sum(summary.bad.values()),
        "reasons": reasons,
        **counts,
        **item_counts,
        **({"segments": len(segments)} if segments else {}),
    }


@dataclass(frozen=True)
class _Summary:
    rows: int
    bad: Counter[str]
    items: set[str]
    last_ms: int


def check_sources(data: DataConfig) -> None:
    """Find missing files, unreadable ones and missing columns before anything is started.

    Raises:
        DataError: what is wrong, where, and the setting that mends it.
    """
    for name, present in columns_by_file(data.logs).items():
        require_columns(event_columns(data), present, uri=name)
    if data.items:
        check_items(data)


def _checked_events(data: DataConfig) -> ray.data.Dataset:
    import ray.data

    check_sources(data)
    pieces = pieces_of(data.logs)
    if not pieces:  # Parquet without a row group
        raise DataError(_NO_EVENTS, where=data.logs, mend=_NO_EVENTS_MEND)
    rows = ray.data.from_items([asdict(piece) for piece in pieces], override_num_blocks=len(pieces))
    return rows.map_batches(partial(_check_pieces, data=data), batch_format="pyarrow", batch_size=1).materialize()


def _check_pieces(batch: pa.Table, data: DataConfig) -> Iterator[pa.Table]:
    columns = list(dict.fromkeys(event_columns(data).values()))
    for piece in batch.to_pylist():
        for table in read_piece(Piece(**piece), columns, uri=data.logs):
            yield check_events(table, data)


def _summarise(checked: ray.data.Dataset) -> _Summary:
    def count(batch: pa.Table) -> pa.Table:
        frame = pl.DataFrame(pl.from_arrow(batch))
        good = frame.filter(pl.col(r.REASON).is_null())
        reasons = frame.filter(pl.col(r.REASON).is_not_null())[r.REASON].value_counts()
        last = good[r.TIMESTAMP].max()
        return pa.table(
            {
                "rows": [len(frame)],
                "last": pa.array([last if last is not None else 0], pa.int64()),
                "items": pa.array([good[r.ITEM_ID].unique().to_list()], pa.list_(pa.string())),
                "reasons": pa.array([reasons[r.REASON].to_list()], pa.list_(pa.string())),
                "counts": pa.array([reasons["count"].to_list()], pa.list_(pa.int64())),
            }
        )

    rows, last, items, bad = 0, 0, set[str](), Counter[str]()
    for part in checked.map_batches(count, batch_format="pyarrow", batch_size=None).take_all():
        rows += part["rows"]
        last = max(last, part["last"])
        items.update(part["items"])
        bad.update(dict(zip(part["reasons"], part["counts"], strict=True)))
    return _Summary(rows, bad, items, last)


def _segments(checked: ray.data.Dataset, positive_level: int) -> dict[str, dict[str, int]]:
    """Segment -> positive events of its most popular items, of all phases: nothing is judged by them."""
    pair = [r.SEGMENT, r.ITEM_ID]

    def count(batch: pa.Table) -> pa.Table:
        frame = pl.DataFrame(pl.from_arrow(batch)).filter(pl.col(r.REASON).is_null(), pl.col(r.LEVEL) >= positive_level)
        return (
            frame.filter(pl.col(r.SEGMENT).fill_null("") != "").group_by(pair).agg(pl.len().cast(pl.Int64).alias(r.POPULARITY)).to_arrow()
        )

    parts = checked.map_batches(count, batch_format="pyarrow", batch_size=None).iter_batches(batch_format="pyarrow", batch_size=None)
    frames = [pl.DataFrame(pl.from_arrow(part)) for part in parts if part.num_rows]
    if not frames:
        return {}
    counts = pl.concat(frames).group_by(pair).agg(pl.col(r.POPULARITY).sum())
    sizes = counts.group_by(r.SEGMENT).agg(pl.col(r.POPULARITY).sum()).sort(r.POPULARITY, r.SEGMENT, descending=True)
    if len(sizes) > _MOST_SEGMENTS:
        get_logger(STEP).warning("only the largest segments are kept", kept=_MOST_SEGMENTS, left_out=len(sizes) - _MOST_SEGMENTS)
    best = counts.sort(r.POPULARITY, r.ITEM_ID, descending=[True, False]).group_by(r.SEGMENT, maintain_order=True).head(_SEGMENT_ITEMS)
    kept = best.join(sizes.head(_MOST_SEGMENTS).select(r.SEGMENT), on=r.SEGMENT)
    found: dict[str, dict[str, int]] = {}
    for segment, item_id, popularity in kept.select(*pair, r.POPULARITY).iter_rows():
        found.setdefault(segment, {})[item_id] = popularity
    return found


def _write_quarantine(checked: ray.data.Dataset, uri: str) -> None:
    def bad_rows(batch: pa.Table) -> pa.Table:
        frame = pl.DataFrame(pl.from_arrow(batch)).filter(pl.col(r.REASON).is_not_null())
        return frame.select(pl.lit("events").alias("source"), r.REASON, r.RAW).to_arrow().cast(r.QUARANTINE)

    parts = [b for b in checked.map_batches(bad_rows, batch_format="pyarrow").iter_batches(batch_format="pyarrow") if b.num_rows]
    storage.write_table(pa.concat_tables(parts), storage.join(uri, "events.parquet"))


def _refuse_too_many_bad(reasons: Counter[str], rows: int, what: str, data: DataConfig, *, where: str) -> None:
    bad = reasons.total()
    if bad == rows or bad > data.max_bad_fraction * rows:
        top = "; ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        hints = [HINTS[reason] for reason, _ in reasons.most_common() if reason in HINTS]
        raise DataError(
            f"{bad} of {rows} {what} are bad ({bad / rows:.1%}, allowed {data.max_bad_fraction:.1%}): {top}",
            where=where,
            mend=" or ".join([*hints, "repair the file", "raise data.max_bad_fraction"]),
        )


def _write_timelines(
    checked: ray.data.Dataset, catalogue: pl.DataFrame, config: Config, cuts: Cuts, uri: str
) -> tuple[np.ndarray, dict[str, int]]:
    import ray
    import ray.data

    shards, n_items = config.data.shards, len(catalogue)
    index = ray.put(catalogue.select(r.ITEM_ID, r.ITEM_INDEX).to_arrow())

    def assign(batch: pa.Table) -> pa.Table:
        frame = pl.DataFrame(pl.from_arrow(batch)).filter(pl.col(r.REASON).is_null())
        indexed = frame.join(pl.DataFrame(pl.from_arrow(ray.get(index))), on=r.ITEM_ID, how="inner")
        shard = [zlib.crc32(user.encode()) % shards for user in indexed[r.USER_ID]]
        columns = (r.USER_ID, r.ITEM_INDEX, r.REQUEST_ID, r.TIMESTAMP, r.LEVEL, r.SIGNALS)
        return indexed.select(*columns, pl.Series(_SHARD, shard, dtype=pl.Int32)).to_arrow()

    write = partial(_write_shards, data=config.data, split=config.split, cuts=cuts, uri=uri, n_items=n_items)
    sharded = checked.map_batches(assign, batch_format="pyarrow").repartition(shards, keys=[_SHARD])
    popularity, counts = np.zeros(n_items, dtype=np.int64), Counter[str]()
    meter = ProgressMeter(shards, step=STEP, unit="shards")
    with _uncut_blocks():
        for part in sharded.map_batches(write, batch_format="pyarrow", batch_size=None).iter_rows():
            popularity += np.asarray(part.pop("popularity"), dtype=np.int64)
            counts.update(part)
            meter.advance(part["shards"])
    meter.close()
    del counts["shards"]
    return popularity, dict(counts)


@contextmanager
def _uncut_blocks() -> Iterator[None]:
    """One block a shard: Ray would cut large blocks, and with them a user's events."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.target_min_block_size
    context.target_max_block_size, context.target_min_block_size = 1 << 40, 0
    try:
        yield
    finally:
        context.target_max_block_size, context.target_min_block_size = before


def _write_shards(batch: pa.Table, data: DataConfig, split: SplitConfig, cuts: Cuts, uri: str, n_items: int) -> Iterator[pa.Table]:
    """Write the shards in a block, each to the file of its number, and yield one row of counts a shard."""
    # A generator, since Ray drops the cause of an error that a plain function raises.
    frame = pl.DataFrame(pl.from_arrow(batch))
    for (shard,), events in frame.partition_by(_SHARD, as_dict=True).items():
        table, counts = build_timelines(events.drop(_SHARD), data, split, cuts)
        storage.write_table(table, storage.join(uri, f"part-{shard:05d}.parquet"))
        popularity = train_popularity(table, n_items, split.positive_level).tolist()
        yield pa.Table.from_pylist([{"shards": 1, **counts, "popularity": popularity}])


def train_popularity(timelines: pa.Table, n_items: int, positive_level: int) -> np.ndarray:
    """Positive events of each item in the training phase, int64 [n_items]."""
    flat = {name: timelines[name].combine_chunks().flatten().to_numpy() for name in ("items", "levels", "phases")}
    counted = (flat["levels"] >= positive_level) & (flat["phases"] == r.Phase.TRAIN)
    return np.bincount(flat["items"][counted], minlength=n_items)


def step(run: Run) -> StepResult:
    """The step `sessions`: raw logs to timelines and catalogue."""
    config = run.config
    inputs = {"logs": _fingerprint(config.data.logs), "items": _fingerprint(config.data.items) if config.data.items else ""}

    def work(out_uri: str) -> dict[str, Any]:
        with ray_session(config.cluster):
            return prepare_sessions(config, out_uri)

    settings = {"data": config.data.model_dump(exclude={"logs", "items"}), "split": config.split.model_dump()}
    return run_step(run, STEP, work, settings=settings, inputs=inputs, code=CODE)


def _fingerprint(uri: str) -> str:
    """Names, sizes and times of the files behind a URI; the logs themselves may be too large to hash."""
    _, files = data_files(uri)
    fs, _ = storage.filesystem(uri)
    seen = [fs.info(name) for name in files]
    return storage.hash_json([(i["name"], i["size"], i.get("mtime"), i.get("ETag")) for i in seen])


if __name__ == "__main__":
    job_main(step, ())
