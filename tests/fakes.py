"""A bundle without a model: its catalogue on disk, and a loader whose recommender needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from infra import records, storage

ITEMS = 30


def item_id(index: int) -> str:
    return f"item-{index:02d}"


def write_bundle(folder: Path) -> str:
    """A catalogue in which a higher index is more popular."""
    rows = [
        {
            "item_index": i, "item_id": item_id(i), "title": f"Title {i}", "text": "", "category": "toys", "brand": "", "embedding": None,
            "popularity": i,
        }
        for i in range(ITEMS)
    ]  # fmt: skip
    storage.write_table(pa.Table.from_pylist(rows, schema=records.CATALOGUE), str(folder / "catalogue.parquet"))
    return str(folder)


def write_timelines(folder: Path, users: int, shards: int = 3) -> str:
    """User i did items i, i+1, i+2 (modulo the catalogue) at levels 1, 2, 3."""
    for shard in range(shards):
        rows = [
            {
                "user_id": f"user-{u}", "items": [(u + d) % ITEMS for d in range(3)], "levels": [1, 2, 3], "timestamps": [1, 2, 3],
                "requests": [0, 1, 2], "phases": [0, 1, 2],
            }
            for u in range(shard, users, shards)
        ]  # fmt: skip
        storage.write_table(pa.Table.from_pylist(rows, schema=records.TIMELINES), str(folder / f"part-{shard:05d}.parquet"))
    return str(folder)


def fake_loader(version: str, fail_on: str = "") -> Callable[[str], Any]:
    """A loader that travels to Ray's workers by value: everything it needs is inside it."""
    n_items = ITEMS

    def load(uri: str) -> Any:
        import numpy as np

        from components.retriever.contract import History, Ranked

        class Recommender:
            name = "fake"

            def recommend(self, histories: Sequence[History], k: int, *, exclude_seen: bool) -> list[Ranked]:
                """What follows the last item of the history, in the order of the catalogue."""
                answers = []
                for history in histories:
                    start = int(history.items[-1]) + 1 if len(history.items) else 0
                    if fail_on and start == int(fail_on):
                        raise RuntimeError("the model broke")
                    seen = set(history.items.tolist()) if exclude_seen else set()
                    items = [i % n_items for i in range(start, start + n_items) if i % n_items not in seen][:k]
                    answers.append(Ranked(np.array(items), -np.arange(len(items), dtype=np.float32)))
                return answers

        class Bundle:
            def __init__(self) -> None:
                self.version = version
                self.item_ids = [f"item-{i:02d}" for i in range(n_items)]

            def recommender(self) -> Recommender:
                return Recommender()

        return Bundle()

    return load
