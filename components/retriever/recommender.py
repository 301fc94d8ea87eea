"""The retriever as a recommender: histories in, exactly k items out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.retriever.attention import Prefix
from components.retriever.beam_search import Beams, beam_search, search
from components.retriever.contract import History, Ints, Ranked
from components.retriever.decoding_trie import DecodingTrie
from components.retriever.model import Retriever
from components.retriever.prefix import PrefixCache, prefill
from components.semantic_ids.trie import Trie
from infra.errors import ConfigError, IntegrityError
from infra.sections import DecodingConfig, RetrieverConfig


class RetrieverRecommender:
    """Decodes slates with a trained retriever; leaves become items, the most popular of a shared leaf first.

    Args:
        model: put into evaluation mode.
        trie: of live items.
        decoding: beams, lambdas and score.
        cache: of prompts, by the `users` that `recommend` is given.

    Raises:
        IntegrityError: the trie's SIDs are not those that the model was trained with.
        ConfigError: not as many beams and lambdas as the SIDs have levels.
    """

    name = "retriever"

    def __init__(self, model: Retriever, trie: Trie, decoding: DecodingConfig, *, cache: PrefixCache | None = None) -> None:
        _check_same_sids(model, trie)
        if not len(decoding.beams) == len(decoding.lambdas) == model.n_levels:
            raise ConfigError(
                f"{len(decoding.beams)} beams and {len(decoding.lambdas)} lambdas for SIDs of {model.n_levels} levels",
                where="decoding",
                mend="give one of each per level",
            )
        self.model, self.decoding, self.cache = model.eval(), decoding, cache
        self._counts: Counter[str] = Counter()
        self._use(trie, whole=None)

    def _use(self, trie: Trie, *, whole: Trie | None) -> None:
        model = self.model
        self.trie, self._trie = trie, DecodingTrie(trie, model.sid_codes.device, whole=whole)
        self._leaf_of = np.full(len(model.sid_codes), -1, dtype=np.int64)
        self._leaf_of[trie.leaf_items] = np.repeat(np.arange(trie.n_leaves), np.diff(trie.leaf_start))

    def restricted(self, allowed_N: npt.NDArray[np.bool_]) -> RetrieverRecommender:
        """The same recommender over some of the items only (`ItemFilter.mask`): beams are spent on nothing else."""
        part = copy.copy(self)  # of checked SIDs, and counting where this one counts
        part._use(self.trie.restrict(allowed_N), whole=self._trie.whole)
        return part

    @property
    def unknown_events(self) -> int:
        """How many history events were left out because their item is not in the model's SID table."""
        return self._counts["unknown_events"]

    def recommend(self, histories: Sequence[History], k: int, *, exclude_seen: bool, users: Sequence[str] | None = None) -> list[Ranked]:
        """The best k items of each history; an empty history is decoded from [BOS] alone (cold start).

        Users for whom the beams hold fewer than k items are searched again with twice the beams until they have k or
        the whole trie has been searched.

        Args:
            histories: items that the SID table does not know are left out and counted.
            k: how many items.
            exclude_seen: leave out items that occur in the history.
            users: keys of the histories in the cache.
        """
        if k < 1:
            raise ConfigError(f"{k} items are asked for", where="k", mend="ask for at least one")
        results: list[Ranked] = []
        step = self.decoding.users_per_batch
        for start in range(0, len(histories), step):
            chunk = [self._known(history) for history in histories[start : start + step]]
            prompts = [prompt(history, self.model.config) for history in chunk]
            keys = None if users is None else users[start : start + step]
            prefix = prefill(self.model, prompts, self.cache, keys, for_rank_head=self.decoding.score != "iap")
            results += self._slates(prefix, prompts, [np.unique(h.items) if exclude_seen else np.zeros(0, np.int64) for h in chunk], k)
        return results

    def generate(self, histories: Sequence[History]) -> Ints:
        """codes_RM of every SID that the beams of some histories end in."""
        found = [np.zeros((0, self.model.n_levels), dtype=np.int64)]
        histories = histories if self.trie.n_leaves else []
        for start in range(0, len(histories), self.decoding.users_per_batch):
            chunk = [self._known(history) for history in histories[start : start + self.decoding.users_per_batch]]
            prompts = [prompt(h, self.model.config) for h in chunk]
            prefix = prefill(self.model, prompts, for_rank_head=self.decoding.score != "iap")
            beams = self._search(prefix, prompts, self.decoding.beams, self.decoding.lambdas, None)
            found.append(beams.codes_BWM[beams.scores_BW > float("-inf")].cpu().numpy())
        return np.concatenate(found)

    def _known(self, history: History) -> History:
        known = known_part(history, len(self.model.sid_codes))
        self._counts["unknown_events"] += len(history.items) - len(known.items)
        return known

    def _slates(self, prefix: Prefix, prompts: list[History], seen: list[Ints], k: int) -> list[Ranked]:
        if not self.trie.n_leaves:
            return [Ranked(np.zeros(0, np.int32), np.zeros(0, np.float32)) for _ in seen]
        results: dict[int, Ranked] = {}
        pending = list(range(len(seen)))
        beams, lambdas = list(self.decoding.beams), list(self.decoding.lambdas)
        while pending:
            whole_trie = min(beams) >= self.trie.n_leaves and min(lambdas) >= min(self.trie.n_codes, self.trie.n_leaves)
            part = prefix if len(pending) == len(seen) else prefix.rows(torch.tensor(pending, device=prefix.length_B.device))
            found = self._search(part, [prompts[i] for i in pending], beams, lambdas, self._exhausted_leaves([seen[i] for i in pending]))
            leaves, scores = found.leaves_BW.cpu().numpy(), found.scores_BW.cpu().numpy()
            for index, leaf, score in zip(pending, leaves, scores, strict=True):
                ranked = self._items(leaf[leaf >= 0], score[leaf >= 0], seen[index], k)
                if len(ranked.items) == k or whole_trie:
                    results[index] = ranked
            pending = [i for i in pending if i not in results]
            beams = [max(2 * b, k) for b in beams]
            lambdas = [max(pair) for pair in zip(lambdas, beams, strict=True)]
        return [results[i] for i in range(len(seen))]

    def _search(self, prefix: Prefix, prompts: list[History], beams: list[int], lambdas: list[int], excluded_BX: Tensor | None) -> Beams:
        score = self.decoding.score
        found = search(self.model, prefix, self._trie, beams=beams, lambdas=lambdas, score=score, excluded_BX=excluded_BX, prompts=prompts)
        if bool(found.scores_BW.isnan().any()):
            raise IntegrityError("the model's scores are not numbers", where="retriever", mend="release a model whose weights are finite")
        return found

    def _exhausted_leaves(self, seen: list[Ints]) -> Tensor | None:
        """Leaves all of whose items a user has seen, in rising order, padded with the number of leaves."""
        size = np.diff(self.trie.leaf_start)
        rows = []
        for items in seen:
            leaves, count = np.unique(self._leaf_of[items], return_counts=True)
            rows.append(leaves[(leaves >= 0) & (count == size[leaves])])
        width = max(map(len, rows))
        if not width:
            return None
        padded = np.full((len(rows), width), self.trie.n_leaves, dtype=np.int64)
        for row, leaves in enumerate(rows):
            padded[row, : len(leaves)] = leaves
        return torch.from_numpy(padded).to(self.model.sid_codes.device)

    def _items(self, leaves: Ints, scores: npt.NDArray[np.float32], seen: Ints, k: int) -> Ranked:
        """The leaves' items in order, without those seen."""
        start, stop = self.trie.leaf_start[leaves], self.trie.leaf_start[leaves + 1]
        count = stop - start
        place = np.repeat(stop - np.cumsum(count), count) + np.arange(count.sum())
        items = self.trie.leaf_items[place]
        kept = ~np.isin(items, seen)
        return Ranked(items[kept][:k].astype(np.int32), np.repeat(scores, count)[kept][:k].astype(np.float32))


def known_part(history: History, n_items: int) -> History:
    """The events of a history whose items are among the first `n_items`."""
    known = (history.items >= 0) & (history.items < n_items)
    return history if known.all() else History(history.items[known], history.levels[known])


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
        chunk = [known_part(h, len(model.sid_codes)) for h in histories[start : start + users_per_batch]]
        prompts = [prompt(h, model.config) for h in chunk]
        found = beam_search(model.eval(), prompts, None, beams=ones, lambdas=ones, score="iap")
        misses += sum(tuple(codes) not in known for codes in found.codes_BWM[:, 0].cpu().tolist())
    return misses / max(len(histories), 1)


def _check_same_sids(model: Retriever, trie: Trie) -> None:
    codes = model.sid_codes.cpu().numpy()
    same = trie.n_codes == model.n_codes and trie.n_levels == model.n_levels and int(trie.leaf_items.max(initial=-1)) < len(codes)
    if not same or not np.array_equal(np.repeat(trie.leaf_codes(), np.diff(trie.leaf_start), axis=0), codes[trie.leaf_items]):
        raise IntegrityError(
            "the SIDs to decode are not those that the model was trained with",
            where="the SID table",
            mend="train again, or use the table that the model was trained on",
        )
