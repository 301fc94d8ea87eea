"""Timelines from raw events on Ray against one polars process.

    python -m tests.benchmarks.sessions [--quick]

A simulated log of 2 million events of 50,000 users becomes timelines: levels from a flag, requests cut at 30 minutes,
repetitions in a request merged, pages of 8, the temporal protocol's phases, a row of lists a user. Ours is the product's
step (`prepare_sessions`), which also checks every row, on a Ray cluster that runs already; the peer is one polars process
that holds the whole log and writes the same rows, with all cores of the machine. Then 20 million rows: ours alone, ten times
the shards, for the growth of time and of the largest worker.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import polars as pl
import psutil

from components.sessions.job import CATALOGUE_FILE, TIMELINES_FOLDER, prepare_sessions
from components.sessions.timelines import temporal_cuts
from infra import records as r
from infra.cluster import ray_session
from infra.config import Config, load_config
from infra.service_sections import ClusterConfig
from tests.benchmarks.timing import announce, console, finish, parse, table, times

ROWS, EVENTS_A_USER, ITEMS = 2_000_000, 40, 20_000
_FILE_ROWS, _GROUP_ROWS = 1_000_000, 250_000
_DAYS, _START_MS = 14, 1_700_000_000_000
_DAY_MS, _GAP_MS, _PAGE = 86_400_000, 30 * 60_000, 8
_ROWS_A_SHARD = 500_000


def write_log(folder: Path, rows: int) -> None:
    """Events in the order of time, a file a million; no user has two at the same time."""
    folder.mkdir()
    users = rows // EVENTS_A_USER
    for number, first in enumerate(range(0, rows, _FILE_ROWS)):
        count = min(_FILE_ROWS, rows - first)
        rng = np.random.default_rng((rows, number))
        # Files follow one another in time; in a file, event i comes i steps after its start.
        span = _DAYS * _DAY_MS * count // rows
        start = _START_MS + _DAYS * _DAY_MS * first // rows
        frame = pl.DataFrame(
            {
                "user_id": [f"user-{n:08d}" for n in rng.integers(0, users, count)],
                "item_id": [f"item-{n:05d}" for n in (ITEMS * rng.random(count) ** 2).astype(int)],
                "timestamp": start + (np.arange(count) * span) // count,
                "click": rng.random(count) < 0.4,
            }
        )
        frame = frame.unique(["user_id", "timestamp"], keep="first", maintain_order=True)
        frame.write_parquet(folder / f"part-{number:03d}.parquet", row_group_size=_GROUP_ROWS)


def configuration(log: Path, rows: int) -> Config:
    """Of the step, for such a log."""
    return load_config(
        preset="kuairand",
        overrides=[
            f"data.logs={log}",
            "data.columns={timestamp: timestamp, title: null, text: [], category: null, brand: null}",
            "data.level_rules={3: [click]}",
            f"data.shards={max(rows // _ROWS_A_SHARD, 2)}",
        ],
    )


def by_polars(log: Path, out: Path) -> None:
    """The peer: a catalogue number for every item, and a row a user in `timelines.parquet`."""
    events = pl.read_parquet(log / "*.parquet")
    index = events.select(pl.col("item_id").unique().sort()).with_row_index(r.ITEM_INDEX).with_columns(pl.col(r.ITEM_INDEX).cast(pl.Int32))
    settings = configuration(log, len(events)).split
    cuts = temporal_cuts(int(events["timestamp"].max()), settings)  # type: ignore[arg-type]
    user, time_ms = pl.col("user_id"), pl.col("timestamp")
    ordered = (
        events.join(index, on="item_id")
        .select(user, r.ITEM_INDEX, time_ms, pl.when("click").then(3).otherwise(2).cast(pl.Int8).alias("level"))
        .sort("user_id", "timestamp")
    )
    # In order, a flag where something new begins and a running sum of the flags are all that grouping takes.
    is_first = (user != user.shift(1)).fill_null(value=True)
    requests = ordered.with_columns((is_first | (time_ms - time_ms.shift(1) >= _GAP_MS)).cum_sum().alias("request"))
    place = pl.int_range(pl.len()).alias("place")
    merged = (
        requests.with_columns(place)
        .group_by("request", r.ITEM_INDEX)
        .agg(pl.col("user_id").first(), pl.col("timestamp").first(), pl.col("level").max(), pl.col("place").min())
        .sort("place")
    )
    is_request = (pl.col("request") != pl.col("request").shift(1)).fill_null(value=True)
    row = pl.int_range(pl.len())
    is_page = (row - pl.when(is_request).then(row).forward_fill()) % _PAGE == 0
    phase = pl.when(time_ms >= cuts.test_from).then(r.Phase.TEST).when(time_ms >= cuts.valid_from).then(r.Phase.VALID)
    numbered = merged.with_columns(is_page.cum_sum().alias("number"), phase.otherwise(r.Phase.TRAIN).cast(pl.Int8).alias("phase"))
    lists = numbered.group_by("user_id", maintain_order=True).agg(
        pl.col(r.ITEM_INDEX).alias("items"),
        pl.col("level").alias("levels"),
        pl.col("timestamp").alias("timestamps"),
        (pl.col("number") - pl.col("number").first()).cast(pl.Int32).alias("requests"),
        pl.col("phase").alias("phases"),
    )
    lists.write_parquet(out / "timelines.parquet")
    index.write_parquet(out / "catalogue.parquet")


_PEER = """
import sys, time
from pathlib import Path
from tests.benchmarks.sessions import by_polars
start = time.perf_counter()
by_polars(Path(sys.argv[1]), Path(sys.argv[2]))
print(time.perf_counter() - start)
"""


def peer_seconds(log: Path, out: Path) -> float:
    """The work in a process of its own, without the start of Python."""
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", _PEER, str(log), str(out)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def our_seconds(log: Path, rows: int, out: Path) -> float:
    """The product's step, Ray running already."""
    config, start = configuration(log, rows), time.perf_counter()
    prepare_sessions(config, str(out))
    return time.perf_counter() - start


def same_rows(ours: Path, theirs: Path) -> bool:
    """Whether both made the same timelines of the same items."""
    columns = ["user_id", "items", "levels", "timestamps", "requests", "phases"]
    number = [r.ITEM_ID, r.ITEM_INDEX]
    our_items, their_items = (pl.read_parquet(path, columns=number) for path in (ours / CATALOGUE_FILE, theirs / "catalogue.parquet"))
    found = pl.read_parquet(ours / TIMELINES_FOLDER / "*.parquet", columns=columns).sort("user_id")
    expected = pl.read_parquet(theirs / "timelines.parquet", columns=columns).sort("user_id")
    same_items = our_items.select(number).sort(r.ITEM_ID).equals(their_items.select(number))
    return same_items and found.select(columns).equals(expected.select(columns))


@contextmanager
def largest_worker() -> Iterator[list[int]]:
    """Inside, and afterwards, the one entry is the most memory of its own that any of Ray's workers has held."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.name().startswith("ray::"):
                        memory = process.memory_info()
                        most[0] = max(most[0], memory.rss - memory.shared)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()


def measure(folder: Path, *, quick: bool) -> dict[str, object]:
    """Both sides in turns on the small log, ours on the large one; prints the tables."""
    small, large = (200_000, 400_000) if quick else (ROWS, 10 * ROWS)
    write_log(folder / "small", small)
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    with largest_worker() as memory_small:
        for round_ in range(2 if quick else 4):
            ours, peer = our_seconds(folder / "small", small, folder / f"ours{round_}"), peer_seconds(folder / "small", folder / "peer")
            if round_:  # the first one starts the workers
                found["ours"].append(ours)
                found["peer"].append(peer)
    is_same = same_rows(folder / "ours1", folder / "peer")
    seconds = {name: float(np.median(values)) for name, values in found.items()}
    write_log(folder / "large", large)
    with largest_worker() as memory_large:
        grown = our_seconds(folder / "large", large, folder / "large-out")
    rows = [
        [f"{small:,} events, one polars process", f"{seconds['peer']:.1f} s", "", ""],
        [f"{small:,} events, ours", f"{seconds['ours']:.1f} s", times(seconds["ours"] / seconds["peer"]), f"{memory_small[0] >> 20:,} MiB"],
        [f"{large:,} events, ours", f"{grown:.1f} s", times(grown / seconds["ours"]), f"{memory_large[0] >> 20:,} MiB"],
    ]
    table("Raw events to timelines", ["", "time", "over the row above", "largest worker"], rows)
    return {
        "bench": "sessions",
        "over_polars_time": seconds["ours"] / seconds["peer"],
        "same_rows": is_same,
        "growth_20m_over_2m": grown / seconds["ours"],
        "rows": [small, large],
    }


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    announce()
    console.print("on all cores, wall time", highlight=False)
    with tempfile.TemporaryDirectory() as folder, ray_session(ClusterConfig(cpus=2, object_store_mb=2048)):
        finish(measure(Path(folder), quick=arguments.quick), arguments)


if __name__ == "__main__":
    main()
