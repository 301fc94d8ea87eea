"""The trie on a device: a dense first level, then children as slices of flat tensors, so that a step is a gather.

Shapes: B rows (users), W beams, C children of the node that has most of them, N = B W.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from components.semantic_ids.trie import Trie


class DecodingTrie:
    """What the decoder needs of a trie, as tensors.

    Args:
        trie: of live items.
        device: where the decoder runs.
        whole: the trie of all items that `trie` was restricted from.
    """

    def __init__(self, trie: Trie, device: torch.device | str = "cpu", *, whole: Trie | None = None) -> None:
        self.trie = trie
        self.n_leaves = trie.n_leaves
        # Padding behind the last node, so that reading on beyond a node's children stays inside the table.
        widest = [1, *(int(np.diff(start).max(initial=0)) for start in trie.child_start)]
        self._codes = [torch.from_numpy(np.pad(codes, (0, n))).to(device) for codes, n in zip(trie.codes, widest, strict=True)]
        self._first = len(trie.codes[0])
        self._start = [torch.from_numpy(start).to(device) for start in trie.child_start]
        self._count = [start.diff() for start in self._start]
        self._offset = torch.arange(max(widest), device=device)
        self.whole = trie if whole is None else whole
        self._whole = None if whole is None else DecodingTrie(whole, device)
        places = [] if whole is None else [np.searchsorted(whole.node_keys(i), trie.node_keys(i)) for i in range(trie.n_levels - 1)]
        self._place_in_whole = [torch.from_numpy(place).to(device) for place in places]

    def children(self, level: int, nodes_BW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All continuations of some nodes.

        Args:
            level: of the codewords asked for; at level 0 every beam stands at the root.
            nodes_BW: node numbers of level - 1.

        Returns:
            codes_BWC, their node numbers_BWC at `level`, and valid_BWC, false for padding.
        """
        if level == 0:
            codes = self._codes[0][: self._first].expand(*nodes_BW.shape, -1)
            return codes, torch.arange(self._first, device=codes.device).expand_as(codes), torch.ones_like(codes, dtype=torch.bool)
        flat_N = nodes_BW.flatten()
        count_N = self._count[level - 1].index_select(0, flat_N)
        offset_C = self._offset[: int(count_N.max())]
        child_NC = self._start[level - 1].index_select(0, flat_N)[:, None] + offset_C
        codes_NC = self._codes[level].index_select(0, child_NC.flatten())
        shape = (*nodes_BW.shape, len(offset_C))
        return codes_NC.view(shape), child_NC.view(shape), (offset_C < count_N[:, None]).view(shape)

    def siblings(self, level: int, nodes_BW: Tensor) -> tuple[Tensor, Tensor]:
        """All continuations of some nodes with which any item goes on, allowed here or not: codes_BWC and valid_BWC."""
        if self._whole is None:
            codes_BWC, _, valid_BWC = self.children(level, nodes_BW)
            return codes_BWC, valid_BWC
        return self._whole.siblings(level, self._place_in_whole[level - 1][nodes_BW] if level else nodes_BW)
