"""The rank head of the Refined Scoring Phase: target attention of a codeword over hidden states (RankGR Eq. 13-15).

Training asks for a few predictions that each see a prefix of their own (`forward`). Decoding asks for many beams behind
one history: a codeword's attention over that history is the same for all of them, so it is taken once (`prepare`) and
merged with each beam's own hidden states by log-sum-exp (`score`), which is exact.

Shapes: B rows, S history positions, D hidden width, K codewords of a level, Q predictions, W beams, C candidates of a
prediction or beam, L codewords that it has behind it, G heads, E = D / G, X width of the MLP, N beams of all rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers that are held at once: few enough for a core's cache and a laptop's memory, enough to keep a GPU busy.
_SCORES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}
_HIDDEN_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 29}


@dataclass(frozen=True)
class SharedAttention:
    """What all candidates of a row share: each codeword's attention over the history.

    Attributes:
        query_KGE: scaled queries.
        mass_BKG: log of the sum of exp(score) over the history.
        table_RX: what goes into the hidden layer of the MLP, a row each: attended values of [G, B, K], the weight of
            each head's match [G], and of each codeword [K], bias included.
        count_B: history positions seen.
    """

    query_KGE: Tensor
    mass_BKG: Tensor
    table_RX: Tensor
    count_B: Tensor


class RankHead(nn.Module):
    """Attention(query = codeword embedding, keys = values = H), then an MLP; a logit whose sigmoid is Eq. 15.

    The paper hands only the attended vector to its MLP. Ours also gets the codeword, and per head how well it matches
    what it attended to (log of the mean of exp(score)): attention weights are relative and would hide that.
    """

    def __init__(self, hidden_size: int, *, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        # Codeword embeddings are small and hidden states are not: on one scale the MLP can hold them together.
        self.norm = nn.RMSNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        last = nn.Linear(mlp, 1)
        self.mlp = nn.Sequential(nn.Linear(2 * hidden_size + heads, mlp), nn.ReLU(inplace=True), last)
        self.dropout = nn.Dropout(dropout)  # of what candidates share: masks for each of them would cost more than the rest
        # Codewords are trained to point at the hidden states that they follow (Eq. 4), so that attention which starts
        # from their inner products finds the right places from the first step on.
        for projection in (self.query, self.key, self.value):
            nn.init.eye_(projection.weight)
        # The first correction of the prior (`Retriever.rank_prior`) is none.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, codebook_KD: Tensor, codes_BQC: Tensor | None, history_BSD: Tensor, visible_BQS: Tensor, own_BQLD: Tensor) -> Tensor:
        """Logits of candidate codewords.

        Args:
            codebook_KD: embeddings of all codewords of the level.
            codes_BQC: the candidates of each prediction; None for all codewords, in order.
            history_BSD: hidden states of the history, shared by all predictions of a row.
            visible_BQS: which of them a prediction sees.
            own_BQLD: hidden states of the prediction's own earlier codewords. Both together are H (Eq. 13); the hidden
                state that the prediction is made from is among them.

        Returns:
            logits_BQC.
        """
        b, q, s = visible_BQS.shape
        codeword_KD, query_KGE = self._queries(codebook_KD)
        to_attended_XGE, to_codeword_XD, to_match_XG, bias_X = self._first_layer()
        history_BSD, own_BQLD = self.dropout(history_BSD), self.dropout(own_BQLD)
        # The MLP's first layer is linear: its input is put through it before it is attended to, not candidate by candidate.
        value_BGSX = torch.einsum("bsge,xge->bgsx", self._heads(self.value(history_BSD)), to_attended_XGE)
        key_BGES = self._heads(self.key(history_BSD)).permute(0, 2, 3, 1)
        codeword_KX = codeword_KD @ to_codeword_XD.T + bias_X
        if codes_BQC is None:
            query_BGQCE = query_KGE.transpose(0, 1)[None, :, None]
            score_BGQCS = query_BGQCE @ key_BGES[:, :, None]
            hidden_BQCX = codeword_KX
        else:
            query_BGQCE = self._heads(F.embedding(codes_BQC, query_KGE.flatten(1))).movedim(-2, 1)
            score_BGQCS = (query_BGQCE.flatten(2, 3) @ key_BGES).view(b, self.heads, q, -1, s)
            hidden_BQCX = F.embedding(codes_BQC, codeword_KX)
        score_BGQCS = torch.where(visible_BQS[:, None, :, None], score_BGQCS.float(), float("-inf"))
        mass_BGQC = score_BGQCS.logsumexp(-1)
        if own_BQLD.shape[2]:
            score_BGQCL = (query_BGQCE @ self._heads(self.key(own_BQLD)).permute(0, 3, 1, 4, 2)).float()
            mass_BGQC = torch.logaddexp(mass_BGQC, score_BGQCL.logsumexp(-1))
            value_BGQLX = torch.einsum("bqlge,xge->bgqlx", self._heads(self.value(own_BQLD)), to_attended_XGE)
            hidden_BQCX = hidden_BQCX + ((score_BGQCL - mass_BGQC[..., None]).exp().to(value_BGQLX.dtype) @ value_BGQLX).sum(1)
        weight_BGXS = (score_BGQCS - mass_BGQC[..., None]).exp().flatten(2, 3).to(value_BGSX.dtype)
        match_BQCG = mass_BGQC.movedim(1, -1) - (visible_BQS.sum(-1) + own_BQLD.shape[2]).log()[:, :, None, None]
        attended_BQCX = (weight_BGXS @ value_BGSX).sum(1).view(b, q, -1, value_BGSX.shape[-1])
        return torch.as_tensor(self.mlp[1:](hidden_BQCX + attended_BQCX + match_BQCG @ to_match_XG.T).squeeze(-1))

    @torch.no_grad()
    def prepare(self, codebook_KD: Tensor, history_BSD: Tensor, visible_BS: Tensor) -> SharedAttention:
        """Attention of all codewords of a level over the histories, for `score`.

        Args:
            codebook_KD: embeddings of the level's codewords.
            history_BSD: hidden states of each row's history.
            visible_BS: false for padding.
        """
        codeword_KD, query_KGE = self._queries(codebook_KD)
        to_attended_XGE, to_codeword_XD, to_match_XG, bias_X = self._first_layer()
        key_BSGE, value_BSGE = (self._heads(layer(history_BSD)) for layer in (self.key, self.value))
        # The MLP's first layer is linear: values go through it before they are attended to, history by history.
        value_BGSX = torch.einsum("bsge,xge->bgsx", value_BSGE, to_attended_XGE)
        rows, k, s = len(history_BSD), len(codebook_KD), history_BSD.shape[1]
        mass = history_BSD.new_empty(rows, k, self.heads, dtype=torch.float32)
        table = history_BSD.new_empty(self.heads * (rows * k + 1) + k, value_BGSX.shape[-1])
        attended = table[: self.heads * rows * k].view(self.heads, rows, k, -1)
        table[len(table) - k - self.heads :] = torch.cat([to_match_XG.T, codeword_KD @ to_codeword_XD.T + bias_X])
        step = max(_at_once(_SCORES_AT_ONCE, history_BSD.device) // (self.heads * k * s), 1)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            score_BGKS = query_KGE.transpose(0, 1) @ key_BSGE[part].permute(0, 2, 3, 1)
            score_BGKS = score_BGKS.float().masked_fill_(~visible_BS[part, None, None], float("-inf"))
            mass_BGK = score_BGKS.logsumexp(-1)
            mass[part] = mass_BGK.movedim(1, -1)
            weights = score_BGKS.sub_(mass_BGK[..., None]).exp_().to(value_BGSX.dtype)
            attended[:, part] = (weights @ value_BGSX[part]).transpose(0, 1)
        return SharedAttention(query_KGE, mass, table, visible_BS.sum(-1))

    @torch.no_grad()
    def score(self, shared: SharedAttention, codes_BWC: Tensor, own_BWLD: Tensor) -> Tensor:
        """Logits_BWC of candidates of beams that share their row's history.

        Args:
            shared: of `prepare`.
            codes_BWC: candidate codewords of each beam.
            own_BWLD: hidden states of each beam's own earlier codewords; L may be 0.
        """
        b, w, c = codes_BWC.shape
        row_N = torch.arange(b, device=codes_BWC.device).repeat_interleave(w)
        codes_NC, own_NLD = codes_BWC.flatten(0, 1), own_BWLD.flatten(0, 1)
        logits_NC = shared.table_RX.new_empty(b * w, c)
        of_a_beam = c * shared.table_RX.shape[1] + own_BWLD.shape[2] * shared.query_KGE[..., 0].numel()
        step = max(_at_once(_HIDDEN_AT_ONCE, codes_BWC.device) // max(of_a_beam, 1), 1)
        for start in range(0, b * w, step):
            part = slice(start, start + step)
            logits_NC[part] = self._score_beams(shared, row_N[part], codes_NC[part], own_NLD[part])
        return logits_NC.view(b, w, c)

    def _score_beams(self, shared: SharedAttention, row_N: Tensor, codes_NC: Tensor, own_NLD: Tensor) -> Tensor:
        """`score` of N beams, each with the row that it belongs to."""
        (n, c), n_own, (rows, k, _) = codes_NC.shape, own_NLD.shape[1], shared.mass_BKG.shape
        index_NC = codes_NC + row_N[:, None] * k
        mass_NCG = F.embedding(index_NC, shared.mass_BKG.flatten(0, 1))
        total_NCG = mass_NCG
        if n_own:
            key_NLGE, value_NLGE = (self._heads(layer(own_NLD)) for layer in (self.key, self.value))
            score_NLGC = _own_scores(shared.query_KGE, key_NLGE, codes_NC).float()
            own_NGC = score_NLGC[:, 0] if n_own == 1 else score_NLGC.logsumexp(1)
            total_NCG = torch.logaddexp(mass_NCG, own_NGC.transpose(1, 2))
        match_NCG = total_NCG - (shared.count_B[row_N] + n_own).log()[:, None, None]
        # A candidate's hidden layer is a weighted sum of rows: attended history and match by head, and its codeword.
        weight_NCZ = torch.cat([(mass_NCG - total_NCG).exp(), match_NCG, torch.ones_like(mass_NCG[..., :1])], dim=-1)
        head_G = torch.arange(self.heads, device=codes_NC.device)
        of_attended, of_match = head_G * (rows * k), head_G + self.heads * rows * k
        of_codeword_NC = codes_NC + self.heads * (rows * k + 1)
        row_NCZ = torch.cat([index_NC[..., None] + of_attended, of_match.expand(n, c, -1), of_codeword_NC[..., None]], dim=-1)
        weights = weight_NCZ.flatten(0, 1).to(shared.table_RX.dtype)
        hidden_NCX = F.embedding_bag(row_NCZ.flatten(0, 1), shared.table_RX, per_sample_weights=weights, mode="sum").view(n, c, -1)
        if n_own:
            to_own_NYC = (score_NLGC - total_NCG.transpose(1, 2)[:, None]).exp_().flatten(1, 2).to(hidden_NCX.dtype)
            value_NYX = torch.einsum("nlge,xge->nlgx", value_NLGE, self._first_layer()[0]).flatten(1, 2)
            hidden_NCX = torch.baddbmm(hidden_NCX, to_own_NYC.transpose(1, 2), value_NYX)
        return torch.as_tensor(self.mlp[1:](hidden_NCX).squeeze(-1))

    def _queries(self, codebook_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised codewords [K, D] and scaled queries [K, G, E]."""
        codeword_KD = self.dropout(self.norm(codebook_KD))
        return codeword_KD, self._heads(self.query(codeword_KD)) / math.sqrt(codebook_KD.shape[-1] // self.heads)

    def _first_layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The MLP's first layer by what it multiplies: attended values [X, G, E], codeword [X, D], match [X, G]; its bias [X]."""
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        d = self.norm.normalized_shape[0]
        weight_XF = first.weight
        return weight_XF[:, :d].view(-1, self.heads, d // self.heads), weight_XF[:, d : 2 * d], weight_XF[:, 2 * d :], first.bias

    def _heads(self, x: Tensor) -> Tensor:
        """[..., D] to [..., G, E]."""
        return x.view(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)


def _own_scores(query_KGE: Tensor, key_NLGE: Tensor, codes_NC: Tensor) -> Tensor:
    """Scores_NLGC of candidates against a beam's own hidden states."""
    if 4 * codes_NC.shape[1] < len(query_KGE):
        return torch.einsum(
            "nlge,ncge->nlgc", key_NLGE, F.embedding(codes_NC, query_KGE.flatten(1)).view(*codes_NC.shape, *query_KGE.shape[1:])
        )
    # For many candidates, all codewords in one matrix product are cheaper than a query gathered for each.
    score_NLGK = torch.einsum("nlge,kge->nlgk", key_NLGE, query_KGE)
    return score_NLGK.gather(-1, codes_NC[:, None, None].expand(-1, *key_NLGE.shape[1:3], -1))


def _at_once(limits: dict[str, int], device: torch.device) -> int:
    return limits.get(device.type, limits["cpu"])
