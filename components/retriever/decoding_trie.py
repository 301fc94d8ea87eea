"""The trie on a device: a dense first level, then children as slices of flat tensors, so that a step is a gather.

Shapes: B rows (users), W beams, C children of the node that has most of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from components.semantic_ids.trie import Trie


class DecodingTrie:
    """What the decoder needs of a trie, as tensors.

    Args:
        trie: of live items.
        device: where the decoder runs.
    """

    def __init__(self, trie: Trie, device: torch.device | str = "cpu") -> None:
        self.trie = trie
        self.n_leaves = trie.n_leaves
        self._codes = [torch.from_numpy(codes).to(device) for codes in trie.codes]
        self._start = [torch.from_numpy(start).to(device) for start in trie.child_start]

    def children(self, level: int, nodes_BW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All continuations of some nodes.

        Args:
            level: of the codewords asked for; at level 0 every beam stands at the root.
            nodes_BW: node numbers of level - 1.

        Returns:
            codes_BWC, their node numbers_BWC at `level`, and valid_BWC, false for padding.
        """
        if level == 0:
            codes = self._codes[0].expand(*nodes_BW.shape, -1)
            return codes, torch.arange(codes.shape[-1], device=codes.device).expand_as(codes), torch.ones_like(codes, dtype=torch.bool)
        start = self._start[level - 1]
        begin_BW = start[nodes_BW]
        count_BW = start[nodes_BW + 1] - begin_BW
        offset_C = torch.arange(int(count_BW.max()), device=nodes_BW.device)
        valid_BWC = offset_C < count_BW[..., None]
        child_BWC = (begin_BW[..., None] + offset_C).clamp_max_(len(self._codes[level]) - 1)
        return self._codes[level][child_BWC], child_BWC, valid_BWC
