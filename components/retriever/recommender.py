"""The retriever as a recommender: histories in, exactly k items out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from components.retriever.beam_search import Beams, beam_search
from components.retriever.contract import History, Ints, Ranked
from components.retriever.model import Retriever
from components.semantic_ids.trie import Trie
from infra.config import DecodingConfig, RetrieverConfig


class RetrieverRecommender:
    """Decodes slates with a trained retriever; leaves become items, the most popular of a shared leaf first."""

    name = "retriever"

    def __init__(self, model: Retriever, trie: Trie, decoding: DecodingConfig) -> None:
        self.model, self.trie, self.decoding = model.eval(), trie, decoding

    def recommend(self, histories: Sequence[History], k: int, *, exclude_seen: bool) -> list[Ranked]:
        """The best k items of each history; an empty history is decoded from [BOS] alone (cold start).

        Users for whom the beams hold fewer than k items are decoded again with twice the beams until they have k or
        the whole trie has been searched.
        """
        results: list[Ranked | None] = [None] * len(histories)
        pending = list(range(len(histories)))
        beams, lambdas = list(self.decoding.beams), list(self.decoding.lambdas)
        while pending:
            whole_trie = min(beams) >= self.trie.n_leaves and min(lambdas) >= min(self.trie.n_codes, self.trie.n_leaves)
            step = self.decoding.users_per_batch
            for start in range(0, len(pending), step):
                chunk = pending[start : start + step]
                decoded = self._decode([histories[i] for i in chunk], k, exclude_seen, beams, lambdas)
                for index, ranked in zip(chunk, decoded, strict=True):
                    if len(ranked.items) == k or whole_trie:
                        results[index] = ranked
            pending = [i for i in pending if results[i] is None]
            beams = [max(2 * b, k) for b in beams]
            lambdas = [max(pair) for pair in zip(lambdas, beams, strict=True)]
        return [r for r in results if r is not None]

    def generate(self, histories: Sequence[History]) -> Ints:
        """codes_RM of every SID that the beams of some histories end in."""
        found = [np.zeros((0, self.model.n_levels), dtype=np.int64)]
        for start in range(0, len(histories), self.decoding.users_per_batch):
            prompts = [prompt(h, self.model.config) for h in histories[start : start + self.decoding.users_per_batch]]
            beams = self._search(prompts, self.decoding.beams, self.decoding.lambdas)
            found.append(beams.codes_BWM[beams.scores_BW > float("-inf")].cpu().numpy())
        return np.concatenate(found)

    def _search(self, prompts: list[History], beams: list[int], lambdas: list[int]) -> Beams:
        return beam_search(self.model, prompts, self.trie, beams=beams, lambdas=lambdas, score=self.decoding.score)

    def _decode(self, histories: list[History], k: int, exclude_seen: bool, beams: list[int], lambdas: list[int]) -> list[Ranked]:
        prompts = [prompt(h, self.model.config) for h in histories]
        found = self._search(prompts, beams, lambdas)
        leaves, scores = found.leaves_BW.cpu().numpy(), found.scores_BW.cpu().numpy()
        return [
            self._items(row, score, k, set(h.items.tolist()) if exclude_seen else set())
            for row, score, h in zip(leaves, scores, histories, strict=True)
        ]

    def _items(self, leaves: np.ndarray, scores: np.ndarray, k: int, excluded: set[int]) -> Ranked:
        items: list[int] = []
        kept: list[float] = []
        for leaf, score in zip(leaves[leaves >= 0], scores[leaves >= 0], strict=True):
            for item in self.trie.leaf_items[self.trie.leaf_start[leaf] : self.trie.leaf_start[leaf + 1]]:
                if item not in excluded:
                    items.append(int(item))
                    kept.append(float(score))
            if len(items) >= k:
                break
        return Ranked(np.asarray(items[:k], dtype=np.int32), np.asarray(kept[:k], dtype=np.float32))


def prompt(history: History, config: RetrieverConfig) -> History:
    """The part of a history that the model reads: its latest `max_history` events from `history_min_level` on."""
    keep = np.flatnonzero(history.levels >= config.history_min_level)[-config.max_history :]
    return History(history.items[keep], history.levels[keep])


def unconstrained_invalid_rate(model: Retriever, histories: Sequence[History], *, users_per_batch: int = 64) -> float:
    """Share of greedy SIDs that lead to no item when no trie constrains them: a diagnostic of training (GenRec's HaR)."""
    known = {tuple(codes) for codes in model.sid_codes.cpu().tolist()}
    ones = [1] * model.n_levels
    misses = 0
    for start in range(0, len(histories), users_per_batch):
        prompts = [prompt(h, model.config) for h in histories[start : start + users_per_batch]]
        found = beam_search(model.eval(), prompts, None, beams=ones, lambdas=ones, score="iap")
        misses += sum(tuple(codes) not in known for codes in found.codes_BWM[:, 0].cpu().tolist())
    return misses / max(len(histories), 1)
