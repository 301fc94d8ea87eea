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

    def allowed(self, level: int, nodes: Ints) -> npt.NDArray[np.bool_]:
        """Which codewords continue the given nodes.

        Args:
            level: of the codewords asked for; 0 has no nodes above it and wants `nodes` = [0].
            nodes: node numbers of level - 1.

        Returns:
            mask [len(nodes), K].
        """
        mask = np.zeros((len(nodes), self.n_codes), dtype=bool)
        row, child = self._children(level, nodes)
        mask[row, self.codes[level][child]] = True
        return mask

    def descend(self, level: int, nodes: Ints, codes: Ints) -> Ints:
        """Node numbers at `level` reached from `nodes` of level - 1 by `codes`; every step must be allowed."""
        row, child = self._children(level, nodes)
        table = np.full((len(nodes), self.n_codes), -1, dtype=np.int64)
        table[row, self.codes[level][child]] = child
        found = table[np.arange(len(nodes)), codes]
        assert (found >= 0).all(), "a codeword outside the trie was chosen"
        return np.asarray(found)

    def _children(self, level: int, nodes: Ints) -> tuple[Ints, Ints]:
        """(row of `nodes`, node number at `level`) of every child."""
        if level == 0:
            assert (nodes == 0).all()
            n = len(self.codes[0])
            return np.repeat(np.arange(len(nodes)), n), np.tile(np.arange(n), len(nodes))
        start = self.child_start[level - 1]
        counts = start[nodes + 1] - start[nodes]
        row = np.repeat(np.arange(len(nodes)), counts)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return row, start[nodes][row] + offset


def build_trie(codes_NM: npt.NDArray[np.integer], popularity_N: npt.NDArray[np.integer], *, n_codes: int) -> Trie:
    """Build the trie of a SID table.

    Args:
        codes_NM: SID of each item.
        popularity_N: orders the items of a shared leaf, falling; ties go to the lower index.
        n_codes: K.
    """
    codes = np.asarray(codes_NM, dtype=np.int64)
    n_items, n_levels = codes.shape
    order = np.lexsort((np.arange(n_items), -np.asarray(popularity_N), *codes.T[::-1]))
    ordered = codes[order]
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
    return Trie(n_codes, tuple(last_codes), tuple(starts), np.append(previous_first, n_items), order.astype(np.int64))
