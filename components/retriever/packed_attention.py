"""Attention of packed rows while training: the history is plainly causal, a target sees its part of it and itself (Eq. 7).

No mask over all pairs of positions is made. Within a history, causality alone hides the padding behind it, which a fused
kernel does without a mask; only the targets, few beside the history, bring one.

Shapes: B rows, S history positions, Q target positions, N = S + Q, J heads of keys and values, H of queries, E width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from components.retriever.attention import masked_attention
from components.retriever.packing import Batch, target_mask


class PackedPass:
    """Attention over a batch of packed rows (RankGR Eq. 7, with a history prefix of its own for every target).

    Args:
        batch: whose targets lie behind its histories.
        n_levels: M.
        width: w, positions that a history item takes.
    """

    def __init__(self, batch: Batch, *, n_levels: int, width: int) -> None:
        allowed_BQN = target_mask(batch, n_levels=n_levels, width=width)
        self._n_history = allowed_BQN.shape[2] - allowed_BQN.shape[1]
        bias_BQN = torch.zeros(allowed_BQN.shape, device=allowed_BQN.device).masked_fill_(~allowed_BQN, float("-inf"))
        self._bias_B1QN = bias_BQN[:, None]

    def attend(self, layer: int, query_BHNE: Tensor, key_BJNE: Tensor, value_BJNE: Tensor, scaling: float) -> Tensor:  # noqa: ARG002
        """See `Decoding`; the same in every layer."""
        s = self._n_history
        # Split, not sliced: the gradient of a split is put together once.
        history, targets = query_BHNE.split_with_sizes([s, query_BHNE.shape[2] - s], dim=2)
        grouped = query_BHNE.shape[1] != key_BJNE.shape[1]
        attended = F.scaled_dot_product_attention(
            history, key_BJNE[:, :, :s], value_BJNE[:, :, :s], is_causal=True, scale=scaling, enable_gqa=grouped
        )
        if targets.shape[2]:
            own = masked_attention(targets, key_BJNE, value_BJNE, self._bias_B1QN.to(query_BHNE.dtype), scaling)
            attended = torch.cat([attended, own], dim=2)
        return attended.transpose(1, 2)
