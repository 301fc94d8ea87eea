"""The rank head of the Refined Scoring Phase: target attention of a codeword over hidden states (RankGR Eq. 13-15).

Shapes: B rows, S history positions, D hidden width, K codewords of a level, Q predictions, C candidates a prediction,
L codewords that a prediction has behind it, G heads, E = D / G.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RankHead(nn.Module):
    """Attention(query = codeword embedding, keys = values = H), then an MLP; a logit whose sigmoid is Eq. 15.

    Beside the attended vector, which is all that the paper hands to its MLP, ours gets the codeword and their product.
    """

    def __init__(self, hidden_size: int, *, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        # Codeword embeddings are small and hidden states are not: on one scale the MLP can hold them together.
        self.norm = nn.RMSNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(nn.Linear(3 * hidden_size, mlp), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp, 1))
        # Codewords are trained to point at the hidden states that they follow (Eq. 4), so that attention which starts
        # from their inner products finds the right places from the first step on.
        for projection in (self.query, self.key, self.value):
            nn.init.eye_(projection.weight)

    def forward(self, codebook_KD: Tensor, codes_BQC: Tensor, history_BSD: Tensor, visible_BQS: Tensor, own_BQLD: Tensor) -> Tensor:
        """Logits of candidate codewords.

        Args:
            codebook_KD: embeddings of all codewords of the level.
            codes_BQC: the candidates of each prediction.
            history_BSD: hidden states of the history, shared by all predictions of a row.
            visible_BQS: which of them a prediction sees.
            own_BQLD: hidden states of the prediction's own earlier codewords. Both together are H (Eq. 13); the hidden
                state that the prediction is made from is among them.

        Returns:
            logits_BQC.
        """
        b, q, c = codes_BQC.shape
        codeword_KD = self.norm(codebook_KD)
        scale = (history_BSD.shape[-1] // self.heads) ** -0.5
        query_GKE = self._split(self.query(codeword_KD)) * scale
        # A codeword asks the same of a hidden state whichever prediction it is a candidate of: scores are taken once.
        shared_BGKS = query_GKE @ self._split(self.key(history_BSD)).transpose(-1, -2)
        hidden_BGQKS = shared_BGKS[:, :, None].expand(-1, -1, q, -1, -1)
        index = codes_BQC[:, None, :, :, None].expand(-1, self.heads, -1, -1, shared_BGKS.shape[-1])
        score_BGQCS = hidden_BGQKS.gather(3, index).masked_fill(~visible_BQS[:, None, :, None], float("-inf"))
        value_BGSE = self._split(self.value(history_BSD))
        if not own_BQLD.shape[2]:
            attended_BGQCE = (score_BGQCS.softmax(-1).flatten(2, 3) @ value_BGSE).view(b, self.heads, q, c, -1)
        else:
            score_BGQCL = query_GKE[:, codes_BQC].transpose(0, 1) @ self._split(self.key(own_BQLD)).transpose(-1, -2)
            total_BGQC = torch.logaddexp(score_BGQCS.logsumexp(-1), score_BGQCL.logsumexp(-1))[..., None]
            to_history, to_own = (score_BGQCS - total_BGQC).exp(), (score_BGQCL - total_BGQC).exp()
            attended_BGQCE = (to_history.flatten(2, 3) @ value_BGSE).view(b, self.heads, q, c, -1) + to_own @ self._split(
                self.value(own_BQLD)
            )
        attended_BQCD = attended_BGQCE.permute(0, 2, 3, 1, 4).flatten(3)
        codeword_BQCD = codeword_KD[codes_BQC]
        # Attention weights are relative, so the MLP is also told how the codeword and what it attended to go together.
        features = torch.cat([attended_BQCD, codeword_BQCD, attended_BQCD * codeword_BQCD], dim=-1)
        return torch.as_tensor(self.mlp(features).squeeze(-1))

    def _split(self, x: Tensor) -> Tensor:
        """[B, ..., D] to [B, G, ..., E], or [K, D] to [G, K, E]."""
        heads = x.view(*x.shape[:-1], self.heads, -1)
        return heads.movedim(-2, 0 if x.dim() == 2 else 1)
