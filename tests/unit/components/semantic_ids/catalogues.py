"""Small catalogues for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from components.semantic_ids.blocks import Catalogue
from infra import records as r
from infra import storage


def items(texts: Sequence[str], embeddings: Sequence[Sequence[float] | None] | None = None, ids: Sequence[str] | None = None) -> pa.Table:
    """CATALOGUE rows of such texts and embeddings; called item-0, item-1, ... unless there are ids."""
    blank = dict.fromkeys((r.TITLE, r.CATEGORY, r.BRAND), "")
    rows = [
        {
            **blank,
            r.ITEM_INDEX: number,
            r.ITEM_ID: ids[number] if ids else f"item-{number}",
            r.TEXT: text,
            r.EMBEDDING: embeddings[number] if embeddings else None,
            r.POPULARITY: 0,
        }
        for number, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, schema=r.CATALOGUE)


def written(table: pa.Table, folder: str | Path) -> Catalogue:
    """The rows as a file."""
    path = Path(folder, "catalogue.parquet")
    storage.write_table(table, str(path))
    return Catalogue(path)
