"""The SIDs of live items as a trie in flat arrays: only paths that lead to an item can be decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trie:
    """Nodes of one level are numbered in the lexicographic order of their prefixes; children are CSR slices.

    Attributes:
        n_codes: K, codewords a level.
        codes: per level, the last codeword of each node.
        child_start: per level but the last, [nodes + 1]: children of node i are nodes start[i]..start[i+1] below.
        leaf_start: [leaves + 1], items of leaf i are `leaf_items[leaf_start[i]:leaf_start[i+1]]`.
        leaf_items: item indices, the most popular of a leaf first.
    """

    n_codes: int
    codes: tuple[Ints, ...]
    child_start: tuple[Ints, ...]
    leaf_start: Ints
    leaf_items: Ints

    @property
    def n_levels(self) -> int:
        """M."""
        return len(self.codes)

    @property
    def n_leaves(self) -> int:
        """How many SIDs carry an item."""
        return len(self.codes[-1])

    def leaf_codes(self) -> Ints:
        """The SID of each leaf, [leaves, M]."""
        columns, node = [], np.arange(self.n_leaves)
        for level in range(self.n_levels - 1, -1, -1):
            columns.append(self.codes[level][node])
            if level:
                node = np.searchsorted(self.child_start[level - 1], node, side="right") - 1
        return np.stack(columns[::-1], axis=1)

    def node_keys(self, level: int) -> Ints:
        """A number for each node of a level that tells its prefix and rises from node to node."""
        keys = self.codes[0]
        for codes, start in zip(self.codes[1 : level + 1], self.child_start, strict=False):
            keys = np.repeat(keys, np.diff(start)) * self.n_codes + codes
        return keys

    def restrict(self, allowed_N: npt.NDArray[np.bool_]) -> Trie:
        """The trie of those items only that are allowed; paths that lead to none of them are gone."""
        kept = allowed_N[self.leaf_items]
        codes = np.repeat(self.leaf_codes(), np.diff(self.leaf_start), axis=0)
        return _trie_of_ordered(codes[kept], self.leaf_items[kept], self.n_codes)


def build_trie(codes_NM: npt.NDArray[np.integer], popularity_N: npt.NDArray[np.integer], *, n_codes: int) -> Trie:
    """Build the trie of a SID table.

    Args:
        codes_NM: SID of each item.
        popularity_N: orders the items of a shared leaf, falling; ties go to the lower index.
        n_codes: K.
    """
    codes = np.asarray(codes_NM, dtype=np.int64)
    order = np.lexsort((np.arange(len(codes)), -np.asarray(popularity_N), *codes.T[::-1]))
    return _trie_of_ordered(codes[order], order.astype(np.int64), n_codes)


def _trie_of_ordered(ordered: Ints, items: Ints, n_codes: int) -> Trie:
    """The trie of items that are given with their SIDs in lexicographic order."""
    n_items, n_levels = ordered.shape
    last_codes, starts = [], []
    previous_first = np.zeros(1, dtype=np.int64)  # first row of each node of the level above; the root at first
    for level in range(n_levels):
        is_new = np.ones(n_items, dtype=bool)
        is_new[1:] = (ordered[1:, : level + 1] != ordered[:-1, : level + 1]).any(axis=1)
        first = np.flatnonzero(is_new)
        last_codes.append(ordered[first, level])
        if level > 0:
            starts.append(np.append(np.searchsorted(first, previous_first), len(first)))
        previous_first = first
    return Trie(n_codes, tuple(last_codes), tuple(starts), np.append(previous_first, n_items), items)
