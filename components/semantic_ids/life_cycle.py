"""SID tables over time: codes of an earlier table, what a new fit changed, items that join without one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.semantic_ids.coder import Coder
from components.semantic_ids.collisions import resolve_collisions
from components.semantic_ids.shards import Codes
from components.semantic_ids.table import codes_of, sids_table
from infra import records as r
from infra.errors import DataError


def earlier_codes(sids: pa.Table, item_ids: pa.Array | pa.ChunkedArray, *, levels: int, codes: int) -> Codes:
    """codes_NM that an earlier SIDS table gave these items, -1 for items that it does not have.

    Raises:
        DataError: a table of other levels, or of more codes.
    """
    flat = np.asarray(pc.list_flatten(sids[r.CODES]), np.int32)
    known_PM = flat.reshape(len(sids), len(flat) // max(len(sids), 1))
    if len(sids) and (known_PM.shape[1] != levels or known_PM.max() >= codes):
        raise DataError(
            f"the earlier SIDs have {known_PM.shape[1]} levels of up to {1 + known_PM.max()} codes, the settings {levels} of {codes}",
            where="semantic_ids.earlier",
            mend="keep semantic_ids.levels and codes, or fit without the earlier table",
        )
    rows_N = np.asarray(pc.fill_null(pc.index_in(item_ids, sids[r.ITEM_ID]), -1))
    found_NM = np.full((len(rows_N), levels), -1, np.int32)
    found_NM[rows_N >= 0] = known_PM[rows_N[rows_N >= 0]]
    return found_NM


def churn(before_NM: Codes, after_NM: Codes) -> dict[str, Any]:
    """What a new fit changed: items that both tables have, and the share of them whose SID, and whose prefix, is another one."""
    both = (before_NM >= 0).all(axis=1)
    changed = before_NM[both] != after_NM[both]
    by_level = [float(changed[:, : level + 1].any(axis=1).mean()) if both.any() else 0.0 for level in range(before_NM.shape[1])]
    return {"items": int(both.sum()), "changed": by_level[-1], "changed_by_level": by_level, "new": int((~both).sum())}


def add_items(sids: pa.Table, coder: Coder, items: pa.Table, *, capacity: int) -> pa.Table:
    """A SIDS table with more items, encoded on the frozen codebooks; whoever was there keeps its SID and index.

    Args:
        sids: as it is.
        coder: that the table was made with.
        items: CATALOGUE rows; those that the table has already are left out. Indices go on from the table's.
        capacity: items a SID.

    Returns:
        the grown table; equal to `sids` where nothing is new.

    Raises:
        DataError: an item id that occurs twice, unusable embeddings, no room for so many.
    """
    ids = items[r.ITEM_ID].to_pylist()
    twice = sorted(item_id for item_id, count in Counter(ids).items() if count > 1)
    if twice:
        raise DataError(f"{len(twice)} item ids occur twice: {', '.join(twice[:5])}", mend="give each new item once")
    known = set(sids[r.ITEM_ID].to_pylist())
    new = items.filter(pa.array([item_id not in known for item_id in ids]))
    if not len(new):
        return sids
    room = len(coder.quantizer.codebooks[0].codewords_KD) ** len(coder.quantizer.codebooks) * capacity
    if len(sids) + len(new) > room:
        raise DataError(
            f"there is room for {room} items, {len(sids)} are there and {len(new)} are new",
            mend="fit anew with more codes (semantic_ids.codes); semantic_ids.earlier cannot help then",
        )
    vectors, encoded = coder.encode(new)
    popularity = new[r.POPULARITY].to_numpy()
    codes = resolve_collisions(encoded, vectors, coder.quantizer.codebooks, popularity, capacity=capacity, taken_PM=codes_of(sids))
    numbered = new.set_column(new.schema.get_field_index(r.ITEM_INDEX), r.ITEM_INDEX, pa.array(len(sids) + np.arange(len(new)), pa.int32()))
    return pa.concat_tables([sids, sids_table(numbered, codes)]).combine_chunks()
