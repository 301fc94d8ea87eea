"""A log of likes small enough to be read, and one large enough to be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra import records as r
from infra import storage
from infra.config import Config, load_config

MINUTE_MS = 60_000


def configuration(*overrides: str) -> Config:
    """The smallest preset with two signals."""
    return load_config(preset="tiny", overrides=["data.columns.signals={like: is_like, watch: seconds}", *overrides])


def timelines(*users: list[tuple[int, int, int, float | None, float | None]]) -> pa.Table:
    """Users given by (item, request, phase, like, watch) of their events, a minute apart."""
    rows = [
        {
            "user_id": f"u{number}",
            "items": [item for item, *_ in events],
            "levels": [3] * len(events),
            "timestamps": [at * MINUTE_MS for at in range(len(events))],
            "requests": [request for _, request, *_ in events],
            "phases": [phase for _, _, phase, *_ in events],
            "signals": [value for *_, like, watch in events for value in (like, watch)],
        }
        for number, events in enumerate(users)
    ]
    return pa.Table.from_pylist(rows, schema=r.TIMELINES)


def catalogue(items: int) -> pa.Table:
    """Items of three categories."""
    rows = [
        {"item_index": at, "item_id": f"i{at}", "title": "", "text": "", "category": f"c{at % 3}", "brand": "", "popularity": 0}
        for at in range(items)
    ]
    return pa.Table.from_pylist(rows, schema=r.CATALOGUE)


def learnable(users: int = 60, items: int = 12, events: int = 20) -> pa.Table:
    """Most like the items of one category, in sessions of two; the last requests are for validation and test."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(users):
        shown = rng.permutation(np.arange(events) % items)
        phases = [2 if at >= events - 4 else 1 if at >= events - 8 else 0 for at in range(events)]
        liked = [float((item % 3 == 0) != (rng.random() < 0.1)) for item in shown]
        found.append([(int(item), at // 2, phases[at], liked[at], 5.0 * liked[at]) for at, item in enumerate(shown)])
    return timelines(*found)


def write_sessions(folder: Path, table: pa.Table, items: int = 12) -> str:
    """What the step `sessions` leaves behind."""
    storage.write_table(table, str(folder / "timelines" / "part-00000.parquet"))
    storage.write_table(catalogue(items), str(folder / "catalogue.parquet"))
    storage.commit(str(folder))
    return str(folder)


def slow_batch(table: pa.Table, config: Config, name: str) -> list[dict[str, Any]]:
    """Sessions with their behaviour, one event at a time: what `sessions_of` and `collate` must amount to."""
    at = list(config.data.columns.signals).index(name)
    count = len(config.data.columns.signals)
    found: list[dict[str, Any]] = []
    for line in table.to_pylist():
        last = None
        for event, item in enumerate(line["items"]):
            key = (line["requests"][event], line["phases"][event])
            if key != last:
                found.append({"items": [], "labels": [], "past": line["items"][:event][-config.reward.max_behaviour :], "phase": key[1]})
                last = key
            value = line["signals"][event * count + at]
            threshold = config.reward.thresholds.get(name)
            label = None if value is None else float(value > 0 if threshold is None else value >= threshold)
            found[-1]["items"].append(item)
            found[-1]["labels"].append(label)
    return found
