"""Give every item a SID with room for it: no index token that grows, no SID over its capacity.

`unique` holds one item a SID, `shared` up to `max_items_per_sid`. The most popular items of a SID keep it. Each of the others, in
the order of their popularity, moves to the nearest code with room: another last-level code first, then another one a level above
(FORGE's handling). Deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from components.semantic_ids.quantize import decode
from components.semantic_ids.shards import Codebook, Codes, Ints, Matrix, squared_distances
from components.semantic_ids.table import sid_numbers
from infra.errors import DataError

Prefix = tuple[int, ...]
Order = Callable[[Ints], tuple[npt.NDArray[Any], ...]]
_NEAR = 32  # codes that are tried before all of a level's are put in order
_BLOCK = 4096
_PARTS = 16
_MOST_USED = 1 << 18  # counts at hand


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
    codes_NM: Codes,
    vectors_NL: Matrix,
    codebooks: Sequence[Codebook],
    popularity_N: Ints,
    *,
    capacity: int,
    taken_PM: Codes | None = None,
    before_NM: Codes | None = None,
) -> Codes:
    """Move items out of SIDs that are over their capacity.

    Args:
        codes_NM: the SIDs that quantization gave the items.
        vectors_NL: what was quantized.
        codebooks: of each level.
        popularity_N: who keeps its SID; ties go to the lower index.
        capacity: items a SID.
        taken_PM: SIDs of items that are there already and stay.
        before_NM: SIDs of an earlier table, -1 where there is none. Who had a SID before has the first right to it, and who has to
            move goes back to where it was, if that lies below the same prefix.

    Returns:
        codes_NM with at most `capacity` items a SID, those of `taken_PM` counted.
    """
    n_codes, levels = len(codebooks[0].codewords_KD), len(codebooks)
    taken = np.empty((0, levels), np.int32) if taken_PM is None else taken_PM
    before = np.broadcast_to(np.int32(-1), codes_NM.shape) if before_NM is None else before_NM
    check_capacity(len(codes_NM) + len(taken), levels=levels, codes=n_codes, per_sid=capacity)

    def order(items: Ints) -> tuple[npt.NDArray[Any], ...]:
        """By what items have the right to a SID, the last key first; ties go by index."""
        return -popularity_N[items], (codes_NM[items] != before[items]).any(axis=1)

    taken_P, sids_N = (sid_numbers(codes, n_codes) for codes in (taken, codes_NM))
    stays = _keepers(sids_N, order, taken_P, n_codes**levels, capacity)
    held = np.concatenate([taken_P, sids_N[stays]])
    del sids_N
    held.sort()
    room = _Room(held, n_codes, levels, capacity)
    result = codes_NM.copy()
    movers = np.flatnonzero(~stays)
    movers = movers[np.lexsort(order(movers))]
    returning = (codes_NM[movers, :-1] == before[movers, :-1]).all(axis=1) & (before[movers] >= 0).all(axis=1)
    for item in movers[returning].tolist():
        sid: Prefix = tuple(before[item].tolist())
        if room.below(sid):
            room.take(sid)
            result[item] = sid
            stays[item] = True
    movers = movers[~stays[movers]]
    for start in range(0, len(movers), _BLOCK):
        _place(movers[start : start + _BLOCK], result, vectors_NL, codebooks, room)
    return result


def _keepers(sids_N: Ints, order: Order, taken_P: Ints, n_sids: int, capacity: int) -> npt.NDArray[np.bool_]:
    """Which items find room in their own SID, by rank; a part of all SIDs at a time, as sorting takes several times what it sorts."""
    taken_P = np.sort(taken_P)
    stays = np.zeros(len(sids_N), dtype=bool)
    for part in range(_PARTS):
        low, high = (n_sids * edge // _PARTS for edge in (part, part + 1))
        items = np.flatnonzero((sids_N >= low) & (sids_N < high))
        items = items[np.lexsort((*order(items), sids_N[items]))]
        sids = sids_N[items]
        there = np.searchsorted(taken_P, sids, side="right") - np.searchsorted(taken_P, sids)
        rank = np.arange(len(sids)) - np.searchsorted(sids, sids)
        stays[items[rank < capacity - there]] = True
    return stays


class _Used(dict[Prefix, int]):
    """How many items each prefix and SID holds; looked up among the sorted SIDs of all where it is asked for first."""

    def __init__(self, sids_N: Ints, n_codes: int, levels: int) -> None:
        self._sids_N, self._n_codes, self._levels = sids_N, n_codes, levels

    def __missing__(self, prefix: Prefix) -> int:
        number = 0
        for code in prefix:
            number = number * self._n_codes + code
        below = self._n_codes ** (self._levels - len(prefix))
        low, high = self._sids_N.searchsorted((number * below, (number + 1) * below)).tolist()
        self[prefix] = count = high - low
        return int(count)

    def add(self, sids: list[Prefix]) -> None:
        """Put SIDs among all, and forget what was looked up."""
        more = np.sort(sid_numbers(np.array(sids, np.int64), self._n_codes))
        self._sids_N = np.insert(self._sids_N, np.searchsorted(self._sids_N, more), more)
        self.clear()


class _Room:
    """Where there is room for one more item."""

    def __init__(self, sids_N: Ints, n_codes: int, levels: int, capacity: int) -> None:
        self.n_codes, self.levels, self.capacity = n_codes, levels, capacity
        self.used = _Used(sids_N, n_codes, levels)
        self._taken: list[Prefix] = []

    def below(self, prefix: Prefix) -> bool:
        """Whether a SID with this prefix has room."""
        return self.used[prefix] < self.capacity * int(self.n_codes ** (self.levels - len(prefix)))

    def take(self, sid: Prefix) -> None:
        """One item more."""
        for level in range(1, len(sid) + 1):
            self.used[sid[:level]] += 1
        self._taken.append(sid)
        if len(self.used) > _MOST_USED:
            self.used.add(self._taken)
            self._taken = []


def _place(items: Ints, result: Codes, vectors_NL: Matrix, codebooks: Sequence[Codebook], room: _Room) -> None:
    """Write the new SIDs of these items into `result`, one after the other."""
    left = vectors_NL[items] - decode(result[items], [*codebooks[:-1], Codebook.free(np.zeros_like(codebooks[-1].codewords_KD))])
    distances = squared_distances(left, codebooks[-1].codewords_KD)
    near = min(_NEAR, distances.shape[1])
    nearest = np.argpartition(distances, near - 1, axis=1)[:, :near]
    nearest = np.take_along_axis(nearest, np.lexsort((nearest, np.take_along_axis(distances, nearest, 1)), axis=1), 1)
    for item, codes in zip(items.tolist(), nearest.tolist(), strict=True):
        prefix: Prefix = tuple(result[item, :-1].tolist())
        found = next(((*prefix, code) for code in codes if room.below((*prefix, code))), None)
        found = found or _search(vectors_NL[item], codebooks, room, prefix)
        room.take(found)
        result[item] = found


def _search(vector_L: Matrix, codebooks: Sequence[Codebook], room: _Room, prefix: Prefix) -> Prefix:
    """The rest of this prefix, from near to far, and where that is full, of the prefix a level shorter, and so on."""
    while prefix and not room.below(prefix):
        prefix = prefix[:-1]
    left = vector_L - sum(codebooks[level].codewords_KD[code] for level, code in enumerate(prefix))
    found = _nearest_with_room(left, codebooks, room, prefix)
    assert found is not None, "the capacity was checked"
    return found


def _nearest_with_room(residual_L: Matrix, codebooks: Sequence[Codebook], room: _Room, prefix: Prefix) -> Prefix | None:
    """Depth-first over the codes of this level from near to far, leaving out subtrees that are full."""
    level = len(prefix)
    if level == len(codebooks):
        return prefix
    codewords_KD = codebooks[level].codewords_KD
    for code in np.argsort(squared_distances(residual_L[None], codewords_KD)[0], kind="stable").tolist():
        if room.below((*prefix, code)):
            found = _nearest_with_room(residual_L - codewords_KD[code], codebooks, room, (*prefix, code))
            if found is not None:
                return found
    return None
