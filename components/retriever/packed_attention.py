"""Attention of packed rows while training: the history is plainly causal, a target sees its part of it and itself (Eq. 7).

No mask over all positions is ever made: causality hides the padding behind a history, and targets look at the history
and at their own codewords alone, never at one another. Softmax over both parts together is exact.

Shapes: B rows, S history positions, P targets, T = M - 1 positions of a target, Q = P T, N = S + Q positions, J heads of
keys and values, G heads of the queries for each, H = J G, E width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from components.retriever.packing import Batch, history_positions


class PackedPass:
    """Attention over a batch of packed rows (RankGR Eq. 7, with a history prefix of its own for every target).

    Args:
        batch: whose targets lie behind its histories.
        n_levels: M.
        width: w, positions that a history item takes.
    """

    def __init__(self, batch: Batch, *, n_levels: int, width: int) -> None:
        self._n_history, self._tail = 1 + width * batch.items_BH.shape[1], n_levels - 1
        last_BP = history_positions(batch.target_prefix_BP, width)
        hidden_BPS = torch.arange(self._n_history, device=last_BP.device) > last_BP[..., None]
        bias = torch.zeros(hidden_BPS.shape, device=last_BP.device).masked_fill_(hidden_BPS, float("-inf"))
        self._bias_BPS = bias[:, None, None, :, None]
        self._later_TT = torch.ones(self._tail, self._tail, dtype=torch.bool, device=last_BP.device).triu(1)

    def attend(self, layer: int, query_BHNE: Tensor, key_BJNE: Tensor, value_BJNE: Tensor, scaling: float) -> Tensor:
        """See `Decoding`; the same in every layer."""
        grouped = query_BHNE.shape[1] != key_BJNE.shape[1]
        lengths = [self._n_history, query_BHNE.shape[2] - self._n_history]
        # One split in place of two slices: the gradient is then put together once.
        (query, own_query), (key, own_key), (value, own_value) = (x.split(lengths, dim=2) for x in (query_BHNE, key_BJNE, value_BJNE))
        history = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        if not lengths[1]:
            return history.transpose(1, 2)
        targets = self._attend_targets(own_query * scaling, key, value, *(x.unflatten(2, (-1, self._tail)) for x in (own_key, own_value)))
        return torch.cat([history, targets], dim=2).transpose(1, 2)

    def _attend_targets(self, query_BHQE: Tensor, key_BJSE: Tensor, value_BJSE: Tensor, key_BJPTE: Tensor, value_BJPTE: Tensor) -> Tensor:
        j, s = key_BJSE.shape[1], self._n_history
        query_BJGPTE = query_BHQE.unflatten(2, (-1, self._tail)).unflatten(1, (j, -1))
        to_history = (query_BJGPTE.flatten(2, 4) @ key_BJSE.transpose(-1, -2)).view(*query_BJGPTE.shape[:-1], s)
        to_own = query_BJGPTE @ key_BJPTE[:, :, None].transpose(-1, -2) if self._tail > 1 else (query_BJGPTE * key_BJPTE[:, :, None]).sum(-1, keepdim=True)
        scores = torch.cat([to_history + self._bias_BPS, to_own.masked_fill(self._later_TT, float("-inf"))], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(value_BJSE.dtype)
        attended = (weights[..., :s].flatten(2, 4) @ value_BJSE).view(query_BJGPTE.shape)
        own = weights[..., s:]
        attended = attended + (own @ value_BJPTE[:, :, None] if self._tail > 1 else own * value_BJPTE[:, :, None])
        return attended.flatten(3, 4).flatten(1, 2)
