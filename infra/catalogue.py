"""A bundle's catalogue in memory: ids, titles, popularity. No torch, so that the serving ingress starts fast."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from infra import records, storage
from infra.slate_store import Slate

CATALOGUE_FILE = "catalogue.parquet"


class Item(NamedTuple):
    """What is shown of an item."""

    item_id: str
    title: str
    category: str
    brand: str
    popularity: int


class Catalogue:
    """Items of a bundle by index and by id.

    Args:
        bundle_uri: folder that holds `catalogue.parquet` (`records.CATALOGUE`).

    Raises:
        StorageError: the bundle is not there.
        IntegrityError: the file is damaged.
    """

    def __init__(self, bundle_uri: str) -> None:
        columns = [records.ITEM_INDEX, records.ITEM_ID, records.TITLE, records.CATEGORY, records.BRAND, records.POPULARITY]
        whole = storage.read_table(storage.join(bundle_uri, CATALOGUE_FILE))
        table = whole.select([*columns, *({records.SEGMENTS} & set(whole.column_names))]).sort_by(records.ITEM_INDEX)
        rows = zip(*(table.column(name).to_pylist() for name in columns[1:]), strict=True)
        self.items = [Item(*row) for row in rows]
        self._index = {item.item_id: index for index, item in enumerate(self.items)}
        self.categories = frozenset(item.category for item in self.items if item.category)
        self.segments: dict[str, dict[int, int]] = {}  # of users -> item index -> popularity there
        known = table[records.SEGMENTS].to_pylist() if records.SEGMENTS in table.column_names else []
        for index, entries in enumerate(known):
            for entry in entries or ():
                self.segments.setdefault(entry[records.SEGMENT], {})[index] = entry[records.POPULARITY]

    def __len__(self) -> int:
        return len(self.items)

    def get(self, item_id: str) -> Item | None:
        """An item by its id."""
        index = self._index.get(item_id)
        return None if index is None else self.items[index]

    def index(self, item_id: str) -> int | None:
        """Catalogue index of an item."""
        return self._index.get(item_id)

    def knows(self, segment: str) -> bool:
        """Whether `popular` has something of its own for a segment."""
        return segment in self.segments or segment in self.categories

    def popular(self, k: int, version: str, segment: str = "") -> Slate:
        """The k items with most positive events, as a slate for nobody in particular; ties go to the lower index.

        Args:
            k: how many.
            version: put on the slate.
            segment: of users: what is popular among them, and behind that what is popular with all; or a category of items.
        """
        counts = np.array([item.popularity for item in self.items], np.int64)
        if segment in self.segments:
            overall, counts = counts, np.zeros_like(counts)
            counts[list(self.segments[segment])] = list(self.segments[segment].values())
            order, allowed = np.lexsort((-overall, -counts)), np.ones(len(counts), bool)
        else:
            allowed = np.array([not segment or item.category == segment for item in self.items], bool)
            order = np.argsort(-counts, kind="stable")
        best = order[allowed[order]][:k]
        total = max(int(counts.sum()), 1)
        return Slate(
            user_id="",
            item_ids=tuple(self.items[index].item_id for index in best),
            scores=tuple(float(counts[index]) / total for index in best),
            model_version=version,
            computed_at=time.time_ns() // 1_000_000,
        )
