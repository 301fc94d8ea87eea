"""Give every item a SID with room for it: no index token that grows, no SID over its capacity.

`unique` holds one item a SID, `shared` up to `max_items_per_sid`. Items claim their own code in the order of their
popularity; an item that finds it full moves to the nearest code with room: another last-level code first, then
another one a level above (FORGE's handling). Deterministic.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from components.semantic_ids.quantize import Codes, Matrix, squared_distances
from infra.errors import DataError

Prefix = tuple[int, ...]


def check_capacity(n_items: int, *, levels: int, codes: int, per_sid: int) -> None:
    """Refuse a code space that is too small for the catalogue.

    Raises:
        DataError: with sizes that would do.
    """
    if codes**levels * per_sid < n_items:
        needed = int(np.ceil((n_items / per_sid) ** (1 / levels)))
        raise DataError(
            f"{codes}^{levels} codes x {per_sid} items a code hold {codes**levels * per_sid} items, the catalogue has {n_items}",
            where="semantic_ids.codes, semantic_ids.levels",
            mend=f"set semantic_ids.codes to at least {needed}, better 1.5 times that",
        )


def resolve_collisions(
    codes_NM: Codes, embeddings_ND: Matrix, codebooks_MKD: Matrix, popularity_N: npt.NDArray[np.int64], *, capacity: int
) -> Codes:
    """Move items out of SIDs that are over their capacity.

    Returns:
        codes_NM with at most `capacity` items a SID; the most popular items keep their own code.
    """
    n_codes = codebooks_MKD.shape[1]
    check_capacity(len(codes_NM), levels=len(codebooks_MKD), codes=n_codes, per_sid=capacity)
    used: Counter[Prefix] = Counter()
    result = codes_NM.copy()
    for item in np.lexsort((np.arange(len(codes_NM)), -popularity_N)):
        sid: Prefix = tuple(int(c) for c in codes_NM[item])
        if used[sid] >= capacity:
            found = _nearest_with_room(embeddings_ND[item], codebooks_MKD, used, capacity, ())
            assert found is not None, "the capacity was checked"
            sid = found
            result[item] = sid
        for level in range(1, len(sid) + 1):
            used[sid[:level]] += 1
    return result


def _nearest_with_room(residual_D: Matrix, codebooks_MKD: Matrix, used: Counter[Prefix], capacity: int, prefix: Prefix) -> Prefix | None:
    """Depth-first over the codes of this level from near to far, leaving out subtrees that are full."""
    level, (n_levels, n_codes, _) = len(prefix), codebooks_MKD.shape
    if level == n_levels:
        return prefix
    room_below = capacity * n_codes ** (n_levels - level - 1)
    for code in np.argsort(squared_distances(residual_D[None], codebooks_MKD[level])[0], kind="stable"):
        child = (*prefix, int(code))
        if used[child] < room_below:
            found = _nearest_with_room(residual_D - codebooks_MKD[level, code], codebooks_MKD, used, capacity, child)
            if found is not None:
                return found
    return None
