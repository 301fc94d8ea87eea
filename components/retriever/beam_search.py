"""Two-stage beam search over the trie: IAP picks codewords, the rank head scores them, the best beams go on.

At each level the lambda_l most probable codewords that lead to an item are kept per beam (RankGR Eq. 12), scored, and
the best B_l beams over all go on by their score so far (Eq. 18). No SID without an item can come out.

A prompt is computed once and shared by its beams; between two levels the backbone runs over one position a beam, and
after the last level not at all. Only codewords get logits, and only children in the trie get scores.

Shapes: B rows (users), W beams, M levels, K codewords a level, C candidates of a beam, D hidden width, L codewords that
a beam has behind it, X excluded leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from components.retriever.attention import BeamPass, Prefix
from components.retriever.backbone import run_decoding
from components.retriever.contract import History
from components.retriever.decoding_trie import DecodingTrie
from components.retriever.model import Retriever
from components.retriever.prefix import prefill
from components.semantic_ids.trie import Trie

Score = Literal["rsp", "iap", "sum"]
_NEVER = float("-inf")


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


def beam_search(
    model: Retriever,
    histories: Sequence[History],
    trie: DecodingTrie | Trie | None,
    *,
    beams: Sequence[int],
    lambdas: Sequence[int],
    score: Score,
    excluded_BX: Tensor | None = None,
) -> Beams:
    """Search the best leaves for each history.

    Args:
        model: in evaluation mode.
        histories: already cut to the model's `max_history`.
        trie: of live items; None leaves the search unconstrained.
        beams: W kept after each level.
        lambdas: codewords per beam and level handed to the rank head.
        score: what beams are kept by.
        excluded_BX: see `search`.
    """
    if not len(histories):
        nothing = torch.zeros(0, beams[-1], device=model.sid_codes.device)
        return Beams(nothing.long()[..., None].expand(-1, -1, model.n_levels), nothing.long(), nothing)
    prefix = prefill(model, histories, for_rank_head=score != "iap")
    return search(model, prefix, trie, beams=beams, lambdas=lambdas, score=score, excluded_BX=excluded_BX, prompts=histories)


@torch.inference_mode()
def search(
    model: Retriever,
    prefix: Prefix,
    trie: DecodingTrie | Trie | None,
    *,
    beams: Sequence[int],
    lambdas: Sequence[int],
    score: Score,
    excluded_BX: Tensor | None = None,
    prompts: Sequence[History] = (),
) -> Beams:
    """`beam_search` behind prompts that are computed already.

    Args:
        model: in evaluation mode.
        prefix: of `prefill`.
        trie: of live items; None leaves the search unconstrained.
        beams: W kept after each level.
        lambdas: codewords per beam and level handed to the rank head.
        score: what beams are kept by.
        excluded_BX: leaves that a row must not end in, in rising order; padded with the number of leaves.
        prompts: what `prefix` was computed from; read where the model has a `repeat_bias`.
    """
    if isinstance(trie, Trie):
        trie = DecodingTrie(trie, model.sid_codes.device)
    rows = len(prefix.length_B)
    device = prefix.length_B.device
    nodes_BW = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    codes_BWl = torch.zeros(rows, 1, 0, dtype=torch.int64, device=device)
    scores_BW = torch.zeros(rows, 1, device=device)
    hidden_BWD = prefix.last_BD[:, None]
    own_BWLD = hidden_BWD[:, :, None][:, :, :0]
    beam_pass = BeamPass(prefix)
    for level in range(model.n_levels):
        if level:
            hidden_BWD = _continue(model, prefix, beam_pass, codes_BWl[..., -1], level)
            own_BWLD = torch.cat([own_BWLD, hidden_BWD[:, :, None]], dim=2)
        bias_BWK = _repeat_bias(model, prompts, codes_BWl) if model.repeat is not None and level == model.n_levels - 1 else None
        candidates = _candidates(model, hidden_BWD, trie, level, nodes_BW, bias_BWK)
        if level == model.n_levels - 1 and excluded_BX is not None:
            candidates = candidates.without(excluded_BX)
        # By probability alone, a beam narrower than lambda cannot miss anything that lambda would have kept.
        if score != "iap" or lambdas[level] < beams[level]:
            candidates = candidates.best(lambdas[level])
        gain_BWC = candidates.logp_BWC
        if score != "iap":
            rank_BWC = _rank_scores(model, prefix, candidates, own_BWLD, level)
            gain_BWC = rank_BWC.masked_fill(gain_BWC == _NEVER, _NEVER) if score == "rsp" else gain_BWC + rank_BWC
        total_BWC = gain_BWC.add_(scores_BW[..., None])
        scores_BW, chosen_BW = top_k(total_BWC.flatten(1), beams[level])
        parent_BW = chosen_BW // total_BWC.shape[2]
        codeword_BW = candidates.codes_at(chosen_BW)
        nodes_BW = candidates.nodes_at(chosen_BW).masked_fill_(scores_BW == _NEVER, 0)
        codes_BWl = torch.cat([codes_BWl.gather(1, parent_BW[..., None].expand(-1, -1, level)), codeword_BW[..., None]], dim=-1)
        if level < model.n_levels - 1:
            own_BWLD = own_BWLD.gather(1, parent_BW[..., None, None].expand(-1, -1, level, own_BWLD.shape[-1]))
            beam_pass.reorder(parent_BW)
    if trie is None:
        nodes_BW = torch.full_like(nodes_BW, -1)
    return Beams(codes_BWl, nodes_BW.masked_fill(scores_BW == _NEVER, -1), scores_BW)


@dataclass(frozen=True)
class _Candidates:
    """Continuations of beams.

    Attributes:
        logp_BWC: log p of the codeword; -inf for padding.
        codes_BWC: codewords; None if candidate c is codeword c.
        nodes_BWC: where they lead to in the trie; None without one.
    """

    logp_BWC: Tensor
    codes_BWC: Tensor | None
    nodes_BWC: Tensor | None

    def without(self, excluded_BX: Tensor) -> _Candidates:
        """The candidates that lead to none of some nodes, sorted for each row."""
        assert self.nodes_BWC is not None
        nodes_BY = self.nodes_BWC.flatten(1).contiguous()
        place_BY = torch.searchsorted(excluded_BX, nodes_BY).clamp_max_(excluded_BX.shape[1] - 1)
        hit_BWC = (excluded_BX.gather(1, place_BY) == nodes_BY).view_as(self.logp_BWC)
        return _Candidates(self.logp_BWC.masked_fill(hit_BWC, _NEVER), self.codes_BWC, self.nodes_BWC)

    def best(self, count: int) -> _Candidates:
        """The most probable ones of each beam (RankGR Eq. 12)."""
        if count >= self.logp_BWC.shape[-1]:
            return self
        logp, kept = self.logp_BWC.topk(count, dim=-1)
        codes = kept if self.codes_BWC is None else self.codes_BWC.gather(-1, kept)
        return _Candidates(logp, codes, None if self.nodes_BWC is None else self.nodes_BWC.gather(-1, kept))

    def codes_at(self, chosen_BW: Tensor) -> Tensor:
        """Codewords of chosen candidates, by their number among all of the row."""
        if self.codes_BWC is None:
            return chosen_BW % self.logp_BWC.shape[2]
        return self.codes_BWC.flatten(1).gather(1, chosen_BW)

    def nodes_at(self, chosen_BW: Tensor) -> Tensor:
        """Nodes of chosen candidates; 0 without a trie."""
        return torch.zeros_like(chosen_BW) if self.nodes_BWC is None else self.nodes_BWC.flatten(1).gather(1, chosen_BW)


def _repeat_bias(model: Retriever, prompts: Sequence[History], codes_BWl: Tensor) -> Tensor:
    items_BH = np.full((len(prompts), max(len(h.items) for h in prompts)), -1, dtype=np.int64)
    for row, history in zip(items_BH, prompts, strict=True):
        row[: len(history.items)] = history.items
    seen_BH = torch.from_numpy(items_BH).to(codes_BWl.device)
    history_BHM = model.sid_codes[seen_BH.clamp_min(0)]
    return model.repeat_bias(history_BHM, (seen_BH >= 0)[:, None].expand(-1, codes_BWl.shape[1], -1), codes_BWl)


def _candidates(
    model: Retriever, hidden_BWD: Tensor, trie: DecodingTrie | None, level: int, nodes_BW: Tensor, bias_BWK: Tensor | None
) -> _Candidates:
    logits_BWK = model.level_logits(hidden_BWD, level).float()
    if bias_BWK is not None:
        logits_BWK += bias_BWK
    if trie is None:
        return _Candidates(logits_BWK.sub_(logits_BWK.logsumexp(-1, keepdim=True)), None, None)
    codes_BWC, child_BWC, valid_BWC = trie.children(level, nodes_BW)
    logits_BWC = logits_BWK.gather(-1, codes_BWC).masked_fill_(~valid_BWC, _NEVER)
    among = logits_BWK
    if model.config.codeword_softmax == "children":
        all_codes_BWC, all_valid_BWC = trie.siblings(level, nodes_BW)
        among = logits_BWK.gather(-1, all_codes_BWC).masked_fill_(~all_valid_BWC, _NEVER)
    # A dead beam has no children: the smallest number stands for the logarithm of nothing.
    norm_BW1 = among.logsumexp(-1, keepdim=True).clamp_min(torch.finfo(among.dtype).min)
    return _Candidates(logits_BWC.sub_(norm_BW1), codes_BWC, child_BWC)


def _continue(model: Retriever, prefix: Prefix, beam_pass: BeamPass, codes_BW: Tensor, level: int) -> Tensor:
    """hidden_BWD behind each beam's latest codeword, which stands right behind the beam's prompt and earlier codewords."""
    embeddings = model.embedding(model.token_ids(codes_BW, level - 1))
    positions = (prefix.length_B[:, None] + level - 1).expand_as(codes_BW)
    return run_decoding(model.backbone, embeddings, positions, beam_pass)


def _rank_scores(model: Retriever, prefix: Prefix, candidates: _Candidates, own_BWLD: Tensor, level: int) -> Tensor:
    """Log s of the candidates (Eq. 15)."""
    codes_BWC = candidates.codes_BWC
    if codes_BWC is None:
        codes_BWC = torch.arange(candidates.logp_BWC.shape[-1], device=own_BWLD.device).expand_as(candidates.logp_BWC)
    assert prefix.hidden_BSD is not None, "the prompts were computed without what the rank head reads"
    shared = model.rank_head.prepare(model.codebook(level), prefix.hidden_BSD, prefix.visible())
    logits_BWC = model.rank_head.score(shared, codes_BWC, own_BWLD).float()
    return F.logsigmoid(logits_BWC + model.rank_prior(candidates.logp_BWC))


def top_k(values_BY: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk` of rows, at most as many as there are; for long rows by way of the best blocks.

    The k best values lie in the k blocks with the largest maxima, so that only those are searched.
    """
    rows, n = values_BY.shape
    if n <= 32 * k:
        return values_BY.topk(min(k, n), dim=1)
    block = 1 << round((n / k) ** 0.5).bit_length() - 1
    blocks_BZb = F.pad(values_BY, (0, -n % block), value=_NEVER).view(rows, -1, block)
    _, best_Bk = blocks_BZb.amax(-1).topk(k, dim=1)
    values_Bk, place_Bk = blocks_BZb.gather(1, best_Bk[..., None].expand(-1, -1, block)).flatten(1).topk(k, dim=1)
    # Where a row runs out of finite values, padding may be taken: any place that exists will do for it.
    return values_Bk, (best_Bk.gather(1, place_Bk // block) * block + place_Bk % block).clamp_max_(n - 1)
