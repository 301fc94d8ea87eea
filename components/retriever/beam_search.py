"""Two-stage beam search over the trie: IAP picks codewords, the rank head scores them, the best beams go on.

At each level the lambda_l most probable codewords that lead to an item are kept per beam (RankGR Eq. 12), scored, and
the best B_l beams over all go on by their score so far (Eq. 18). No SID without an item can come out.

Shapes: B rows (users), W beams, M levels, K codewords a level, L candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from components.retriever.contract import History
from components.retriever.model import Encoded, Retriever, take
from components.retriever.packing import Batch, Row, collate
from components.semantic_ids.trie import Trie

Score = Literal["rsp", "iap", "sum"]


@dataclass(frozen=True)
class Beams:
    """The search's result: leaves of the trie in falling order of score.

    Attributes:
        codes_BWM: the SIDs.
        leaves_BW: leaf numbers in the trie; -1 where a row has fewer leaves than beams, and without a trie.
        scores_BW: sum over levels of log p (iap), log s (rsp) or both; -inf where the leaf is -1.
    """

    codes_BWM: Tensor
    leaves_BW: Tensor
    scores_BW: Tensor


@torch.inference_mode()
def beam_search(
    model: Retriever, histories: list[History], trie: Trie | None, *, beams: list[int], lambdas: list[int], score: Score
) -> Beams:
    """Search the best leaves for each history.

    Args:
        model: in evaluation mode.
        histories: already cut to the model's `max_history`.
        trie: of live items; None leaves the search unconstrained.
        beams: W kept after each level.
        lambdas: codewords per beam and level handed to the rank head.
        score: what beams are kept by.
    """
    rows = len(histories)
    device = model.sid_codes.device
    nodes = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    codes = torch.zeros(rows, 1, 0, dtype=torch.int64, device=device)
    scores = torch.zeros(rows, 1, device=device)
    for level in range(model.n_levels):
        logits, encoded, batch = _next_logits(model, histories, codes)
        logp = F.log_softmax(logits, dim=-1)
        if trie is not None:
            logp = logp.masked_fill(~_allowed(trie, level, nodes, scores), float("-inf"))
        best, kept = logp.topk(min(lambdas[level], model.n_codes), dim=-1)
        every_beam = torch.arange(codes.shape[1], device=device).expand(rows, -1)
        gain = torch.zeros_like(best)
        if score in ("rsp", "sum"):
            gain = gain + F.logsigmoid(model.rank_scores(encoded, batch, every_beam, kept, level))
        if score in ("iap", "sum"):
            gain = gain + best
        gain = gain.masked_fill(best == float("-inf"), float("-inf"))
        total = (scores[..., None] + gain).flatten(1)
        scores, chosen = total.topk(min(beams[level], total.shape[1]), dim=-1)
        beam, codeword = chosen // kept.shape[2], kept.flatten(1).gather(1, chosen)
        codes = torch.cat([codes.gather(1, beam[..., None].expand(-1, -1, level)), codeword[..., None]], dim=-1)
        nodes = nodes.gather(1, beam)
        if trie is not None:
            nodes = _descend(trie, level, nodes, codeword, scores)
    no_leaf = (scores == float("-inf")) | (trie is None)
    return Beams(codes, nodes.masked_fill(no_leaf, -1), scores)


def _next_logits(model: Retriever, histories: list[History], codes_BWl: Tensor) -> tuple[Tensor, Encoded, Batch]:
    """Logits_BWK of the next level for all beams: the beams are targets packed behind their history (Eq. 7)."""
    _, width, level = codes_BWl.shape
    zeros = np.zeros(width, dtype=np.int64)
    rows = [Row(h.items, h.levels, zeros, zeros, np.full(width, len(h.items)), zeros) for h in histories]
    batch = collate(rows).to(codes_BWl.device)
    padded = F.pad(codes_BWl, (0, model.n_levels - level))
    encoded = model.encode(batch, padded)
    positions = model.prediction_positions(batch)[..., level]
    return model.level_logits(take(encoded.hidden_BND, positions), level), encoded, batch


def _allowed(trie: Trie, level: int, nodes_BW: Tensor, scores_BW: Tensor) -> Tensor:
    """mask_BWK of codewords that continue a beam; none for a dead beam."""
    alive = (scores_BW > float("-inf")).flatten().cpu().numpy()
    mask = np.zeros((len(alive), trie.n_codes), dtype=bool)
    mask[alive] = trie.allowed(level, nodes_BW.flatten().cpu().numpy()[alive])
    return torch.from_numpy(mask).to(nodes_BW.device).view(*nodes_BW.shape, -1)


def _descend(trie: Trie, level: int, nodes_BW: Tensor, codes_BW: Tensor, scores_BW: Tensor) -> Tensor:
    alive = (scores_BW > float("-inf")).flatten().cpu().numpy()
    found = np.zeros(len(alive), dtype=np.int64)
    found[alive] = trie.descend(level, nodes_BW.flatten().cpu().numpy()[alive], codes_BW.flatten().cpu().numpy()[alive])
    return torch.from_numpy(found).to(nodes_BW.device).view(nodes_BW.shape)
