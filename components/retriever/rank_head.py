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

# How much is held at once: what fits a core's cache, or what keeps a GPU busy.
_SCORES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}
_PAIRS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 21}


@dataclass(frozen=True)
class SharedAttention:
    """What all candidates of a row share: each codeword's attention over the history.

    Attributes:
        query_KGE: scaled queries.
        mass_BKG: log of the sum of exp(score) over the history.
        attended_GBKX: attended values, through the first layer of the MLP.
        codeword_KX: the codeword's own part of that layer, bias included.
        count_B: history positions seen.
    """

    query_KGE: Tensor
    mass_BKG: Tensor
    attended_GBKX: Tensor
    codeword_KX: Tensor
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
        self.mlp = nn.Sequential(nn.Linear(2 * hidden_size + heads, mlp), nn.ReLU(inplace=True), nn.Dropout(dropout), last)
        # Codewords are trained to point at the hidden states that they follow (Eq. 4), so that attention which starts
        # from their inner products finds the right places from the first step on.
        for projection in (self.query, self.key, self.value):
            nn.init.eye_(projection.weight)
        # The first correction of the prior (`Retriever.rank_prior`) is none.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

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
        codeword_KD, query_KGE = self._queries(codebook_KD)
        query_GKE = query_KGE.transpose(0, 1)
        # A codeword asks the same of a hidden state whichever prediction it is a candidate of: scores are taken once.
        shared_BGKS = query_GKE @ self._split(self.key(history_BSD)).transpose(-1, -2)
        hidden_BGQKS = shared_BGKS[:, :, None].expand(-1, -1, q, -1, -1)
        index = codes_BQC[:, None, :, :, None].expand(-1, self.heads, -1, -1, shared_BGKS.shape[-1])
        score_BGQCS = hidden_BGQKS.gather(3, index).masked_fill(~visible_BQS[:, None, :, None], float("-inf"))
        score_BGQCL = query_GKE[:, codes_BQC].transpose(0, 1) @ self._split(self.key(own_BQLD)).transpose(-1, -2)
        mass_BGQC = torch.cat([score_BGQCS, score_BGQCL], dim=-1).logsumexp(-1)
        to_history, to_own = ((score - mass_BGQC[..., None]).exp() for score in (score_BGQCS, score_BGQCL))
        attended_BGQCE = (to_history.flatten(2, 3) @ self._split(self.value(history_BSD))).view(b, self.heads, q, c, -1)
        attended_BGQCE = attended_BGQCE + to_own @ self._split(self.value(own_BQLD))
        match_BQCG = mass_BGQC.movedim(1, -1) - (visible_BQS.sum(-1) + own_BQLD.shape[2]).log()[:, :, None, None]
        features = torch.cat([attended_BGQCE.movedim(1, -2).flatten(3), codeword_KD[codes_BQC], match_BQCG], dim=-1)
        return torch.as_tensor(self.mlp(features).squeeze(-1))

    def prepare(self, codebook_KD: Tensor, history_BSD: Tensor, visible_BS: Tensor) -> SharedAttention:
        """Attention of all codewords of a level over the histories, for `score`.

        Args:
            codebook_KD: embeddings of the level's codewords.
            history_BSD: hidden states of each row's history.
            visible_BS: false for padding.
        """
        codeword_KD, query_KGE = self._queries(codebook_KD)
        to_attended_XGE, to_codeword_XD, _, bias_X = self._first_layer()
        key_BSGE, value_BSGE = (layer(history_BSD).unflatten(-1, (self.heads, -1)) for layer in (self.key, self.value))
        # The MLP's first layer is linear: values go through it before they are attended to, history by history.
        value_BGSX = torch.einsum("bsge,xge->bgsx", value_BSGE, to_attended_XGE)
        rows, k, s = len(history_BSD), len(codebook_KD), history_BSD.shape[1]
        mass = history_BSD.new_empty(rows, k, self.heads, dtype=torch.float32)
        attended = history_BSD.new_empty(self.heads, rows, k, value_BGSX.shape[-1])
        step = max(_at_once(_SCORES_AT_ONCE, history_BSD.device) // (self.heads * k * s), 1)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            score_BGKS = query_KGE.transpose(0, 1) @ key_BSGE[part].permute(0, 2, 3, 1)
            score_BGKS = score_BGKS.float().masked_fill_(~visible_BS[part, None, None], float("-inf"))
            mass_BGK = score_BGKS.logsumexp(-1)
            mass[part] = mass_BGK.movedim(1, -1)
            weights = score_BGKS.sub_(mass_BGK[..., None]).exp_().to(value_BGSX.dtype)
            attended[:, part] = (weights @ value_BGSX[part]).transpose(0, 1)
        own = codeword_KD @ to_codeword_XD.T + bias_X
        return SharedAttention(query_KGE, mass, attended, own, visible_BS.sum(-1))

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
        logits_NC = shared.codeword_KX.new_empty(b * w, c)
        step = max(_at_once(_PAIRS_AT_ONCE, codes_BWC.device) // max(c, 1), 1)
        for start in range(0, b * w, step):
            part = slice(start, start + step)
            logits_NC[part] = self._score_beams(shared, row_N[part], codes_NC[part], own_NLD[part])
        return logits_NC.view(b, w, c)

    def _score_beams(self, shared: SharedAttention, row_N: Tensor, codes_NC: Tensor, own_NLD: Tensor) -> Tensor:
        """`score` of N beams, each with the row that it belongs to."""
        to_attended_XGE, _, to_match_XG, _ = self._first_layer()
        n, c, n_own = *codes_NC.shape, own_NLD.shape[1]
        index_NC = codes_NC + row_N[:, None] * shared.mass_BKG.shape[1]
        mass_NCG = F.embedding(index_NC, shared.mass_BKG.flatten(0, 1))
        total_NCG = mass_NCG
        weights, values_NYX = mass_NCG.new_empty(n, c, 0), own_NLD.new_empty(n, 0, to_attended_XGE.shape[0])
        if n_own:
            key_NLGE, value_NLGE = (layer(own_NLD).unflatten(-1, (self.heads, -1)) for layer in (self.key, self.value))
            # All codewords against each hidden state is one matrix product, cheaper than gathering a query per candidate.
            score_NLGK = torch.einsum("nlge,kge->nlgk", key_NLGE, shared.query_KGE).float()
            score_NLGC = score_NLGK.gather(-1, codes_NC[:, None, None].expand(-1, n_own, self.heads, -1))
            own_NGC = score_NLGC[:, 0] if n_own == 1 else score_NLGC.logsumexp(1)
            total_NCG = torch.logaddexp(mass_NCG, own_NGC.transpose(1, 2))
            weights = (score_NLGC - total_NCG.transpose(1, 2)[:, None]).exp_().flatten(1, 2).transpose(1, 2)
            values_NYX = torch.einsum("nlge,xge->nlgx", value_NLGE, to_attended_XGE).flatten(1, 2)
        hidden_NCX = F.embedding(codes_NC, shared.codeword_KX)
        kept_NCG = (mass_NCG - total_NCG).exp_().to(hidden_NCX.dtype)
        for g in range(self.heads):
            hidden_NCX.addcmul_(kept_NCG[..., g, None], F.embedding(index_NC, shared.attended_GBKX[g].flatten(0, 1)))
        match_NCG = total_NCG - (shared.count_B[row_N] + n_own).log()[:, None, None]
        small_NCY = torch.cat([weights, match_NCG], dim=-1).to(hidden_NCX.dtype)
        values_NYX = torch.cat([values_NYX, to_match_XG.T.expand(n, -1, -1)], dim=1)
        return torch.as_tensor(self.mlp[1:](hidden_NCX.baddbmm_(small_NCY, values_NYX)).squeeze(-1))

    def _queries(self, codebook_KD: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised codewords [K, D] and scaled queries [K, G, E]."""
        codeword_KD = self.norm(codebook_KD)
        return codeword_KD, self.query(codeword_KD).unflatten(-1, (self.heads, -1)) / math.sqrt(codebook_KD.shape[-1] // self.heads)

    def _first_layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The MLP's first layer by what it multiplies: attended values [X, G, E], codeword [X, D], match [X, G]; its bias [X]."""
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        d = self.norm.normalized_shape[0]
        weight_XF = first.weight
        return weight_XF[:, :d].view(-1, self.heads, d // self.heads), weight_XF[:, d : 2 * d], weight_XF[:, 2 * d :], first.bias

    def _split(self, x: Tensor) -> Tensor:
        """[B, ..., D] to [B, G, ..., E]."""
        return x.view(*x.shape[:-1], self.heads, x.shape[-1] // self.heads).movedim(-2, 1)


def _at_once(limits: dict[str, int], device: torch.device) -> int:
    return limits.get(device.type, limits["cpu"])
