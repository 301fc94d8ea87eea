"""SID tables over time: codes of an earlier table, what a new fit changed, items that join without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from components.semantic_ids.coder import Coder
from components.semantic_ids.collisions import resolve_collisions
from components.semantic_ids.shards import Codes
from components.semantic_ids.table import codes_of, sids_table
from infra import records as r
from infra.errors import DataError


def earlier_codes(sids: pa.Table, item_ids: Sequence[str], *, levels: int, codes: int) -> Codes:
    """codes_NM that an earlier SIDS table gave these items, -1 for items that it does not have.

    Raises:
        DataError: a table of other levels, or of more codes.
    """
    known, found = sids[r.ITEM_ID].to_pylist(), sids[r.CODES].to_pylist()
    if found and (len(found[0]) != levels or max(map(max, found)) >= codes):
        raise DataError(
            f"the earlier SIDs have {len(found[0])} levels of up to {1 + max(map(max, found))} codes, the settings {levels} of {codes}",
            where="semantic_ids.earlier",
            mend="keep semantic_ids.levels and codes, or fit without the earlier table",
        )
    by_id = dict(zip(known, found, strict=True))
    nothing = [-1] * levels
    return np.asarray([by_id.get(item_id, nothing) for item_id in item_ids], np.int32).reshape(len(item_ids), levels)


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
    vectors, encoded = coder.encode(new[r.TEXT].to_pylist(), new[r.EMBEDDING].to_pylist(), new[r.ITEM_ID].to_pylist())
    popularity = new[r.POPULARITY].to_numpy()
    codes = resolve_collisions(encoded, vectors, coder.quantizer.codebooks, popularity, capacity=capacity, taken_PM=codes_of(sids))
    numbered = new.set_column(new.schema.get_field_index(r.ITEM_INDEX), r.ITEM_INDEX, pa.array(len(sids) + np.arange(len(new)), pa.int32()))
    return pa.concat_tables([sids, sids_table(numbered, codes)]).combine_chunks()
