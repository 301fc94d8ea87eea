"""A data set on which a tiny model learns within seconds: every user walks round a ring of twelve items."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from infra import records, storage
from infra.config import Config, load_config

N_ITEMS, K = 12, 4


def configuration(*overrides: str) -> Config:
    return load_config(preset="tiny", overrides=["semantic_ids.codes=4", "training.threads_per_worker=1", *overrides])


def sids() -> pa.Table:
    rows = [{"item_index": i, "item_id": f"i{i}", "codes": [i % 4, i // 4], "popularity": 1} for i in range(N_ITEMS)]
    return pa.Table.from_pylist(rows, schema=records.SIDS)


def timelines(users: int = 24, events: int = 9) -> pa.Table:
    """User u does items u, u+1, u+2 ... one after the other; each click comes with an exposure of the item opposite."""
    rows = []
    for user in range(users):
        clicks = [(user + step) % N_ITEMS for step in range(events - user % 3)]
        items = [item for click in clicks for item in (click, (click + 6) % N_ITEMS)]
        requests = [step // 2 for step in range(len(items))]
        rows.append(
            {
                "user_id": f"u{user}",
                "items": items,
                "levels": [records.Level.CLICK, records.Level.EXPOSURE] * len(clicks),
                "timestamps": [60_000 * request for request in requests],
                "requests": requests,
                "phases": [0] * (len(items) - 2) + [1, 2],
            }
        )
    return pa.Table.from_pylist(rows, schema=records.TIMELINES)


def write_inputs(folder: Path, **size: int) -> tuple[str, str]:
    """URIs of the outputs of the steps `sessions` and `semantic_ids`, as far as training reads them."""
    storage.write_table(timelines(**size), str(folder / "sessions" / "timelines" / "part-00000.parquet"))
    storage.write_table(sids(), str(folder / "sids" / "sids.parquet"))
    return str(folder / "sessions"), str(folder / "sids")
