"""Methods that a retriever has to beat: popularity and item-based nearest neighbours.

Both rank the whole catalogue. Equal scores are broken by popularity and then by the lower item index, so the answer
is the same on every machine; a history that says nothing is therefore answered by popularity.
Shape suffixes: B histories of one block, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.evaluation.protocol import TrainEvents
from components.retriever.contract import Floats, History, Ints, Ranked

BASELINES: Final = ("popularity", "item_knn")
_DAY_MS: Final = 86_400_000
_BLOCK_SCORES: Final = 1 << 24  # scores held at once, 64 MiB
_DENSE_ABOVE: Final = 0.1  # share of item pairs from which a dense matrix is the faster one

Doubles = npt.NDArray[np.float64]


class Popularity:
    """The same ranking for everyone.

    score(i) = sum over training events of i with at least `min_level` of 2 ** (-age / half_life), the age counted back
    from the last training event; without a half-life a plain count.
    """

    name: Final = "popularity"

    def __init__(self, weights_N: Doubles) -> None:
        self.weights = weights_N
        self._order = popularity_order(weights_N)

    @classmethod
    def fit(cls, events: TrainEvents, n_items: int, *, min_level: int, half_life_days: float | None = None) -> Popularity:
        """Count the training events.

        Args:
            events: the training phase.
            n_items: size of the catalogue.
            min_level: lowest level that counts.
            half_life_days: age at which an event counts half; None counts all alike.
        """
        kept = events.levels >= min_level
        weights = np.ones(int(kept.sum()), np.float64)
        if half_life_days is not None and len(weights):
            age_days = (events.timestamps.max() - events.timestamps[kept]) / _DAY_MS
            weights = np.exp2(-age_days / half_life_days)
        return cls(np.bincount(events.items[kept], weights, minlength=n_items).astype(np.float64))

    def recommend(self, histories: Sequence[History], k: int, *, exclude_seen: bool) -> list[Ranked]:
        """The k most popular items; see `Recommender`."""
        slates = []
        for history in histories:
            seen = np.unique(history.items) if exclude_seen else np.empty(0, np.int64)
            head = self._order[: k + len(seen)]
            items = head[~np.isin(head, seen)][:k]
            slates.append(Ranked(items, self.weights[items].astype(np.float32)))
        return slates


class ItemKNN:
    """Items that go together with those of the history, the recent ones above all.

    score(i) = sum over j of decay ** j * s(h_j, i), h_0 being the last item of the history (events below `min_level`
    left out), with the shrunk asymmetric cosine

        s(h, i) = c(h, i) / (c(h, h) ** (1 - alpha) * c(i, i) ** alpha + shrinkage),    s(i, i) = 0,

    where c(h, i) is the number of training users with both items (c(i, i): with item i). alpha = 1/2 is the cosine of
    Sarwar et al. (2001); a larger one holds popular items down (Aiolli, 2013). Shrinkage after Bell and Koren (2007).
    """

    name: Final = "item_knn"

    def __init__(
        self, cooccurrence_NN: sp.csr_matrix, popularity_N: Doubles, *, min_level: int, shrinkage: float, decay: float, alpha: float = 0.5
    ) -> None:
        """Turn counts into similarities.

        Args:
            cooccurrence_NN: c, as `count_cooccurrence` gives it.
            popularity_N: breaks ties.
            min_level: events of a history below it are left out.
            shrinkage: pulls similarities that rest on few users towards 0.
            decay: factor from one item of the history to the one before it.
            alpha: share of the candidate in the normalisation.
        """
        self._min_level, self._decay = min_level, decay
        # Columns stand in the order of popularity: a stable sort then breaks ties by it.
        self._order = popularity_order(popularity_N)
        self._column = np.argsort(self._order)
        self._similarity = _similarity(cooccurrence_NN, shrinkage, alpha, self._order)

    @classmethod
    def fit(cls, events: TrainEvents, n_items: int, *, min_level: int, shrinkage: float, decay: float, alpha: float = 0.5) -> ItemKNN:
        """Count co-occurrence and popularity in the training events; arguments as in the constructor."""
        counts_NN = count_cooccurrence(events, n_items, min_level)
        return cls(counts_NN, counts_NN.diagonal(), min_level=min_level, shrinkage=shrinkage, decay=decay, alpha=alpha)

    def recommend(self, histories: Sequence[History], k: int, *, exclude_seen: bool) -> list[Ranked]:
        """The k items of highest score; see `Recommender`."""
        block = max(1, _BLOCK_SCORES // max(1, len(self._order)))
        slates = []
        for start in range(0, len(histories), block):
            part = histories[start : start + block]
            scores_BN = self._score(part)
            for history, scores_N in zip(part, scores_BN, strict=True):
                if exclude_seen:
                    scores_N[self._column[history.items]] = -np.inf
                columns = _best(scores_N, k)
                slates.append(Ranked(self._order[columns], scores_N[columns]))
        return slates

    def _score(self, histories: Sequence[History]) -> Floats:
        """scores_BN, the columns in the order of popularity."""
        kept = [history.items[history.levels >= self._min_level] for history in histories]
        rows = np.repeat(np.arange(len(kept)), [len(items) for items in kept])
        weights = np.concatenate([self._decay ** np.arange(len(items) - 1, -1, -1, dtype=np.float32) for items in kept])
        shape = (len(kept), len(self._order))
        weights_BN = sp.csr_matrix((weights.astype(np.float32), (rows, np.concatenate(kept))), shape=shape)
        if sp.issparse(self._similarity):
            return np.asarray((weights_BN @ self._similarity).toarray(), np.float32)
        return np.asarray(weights_BN.toarray() @ self._similarity, np.float32)


def popularity_order(weights_N: Doubles) -> Ints:
    """Item indices in falling order of weight, the lower index first where weights are equal."""
    return np.argsort(-weights_N, kind="stable")


def count_cooccurrence(events: TrainEvents, n_items: int, min_level: int) -> sp.csr_matrix:
    """counts_NN: how many users have events of at least `min_level` with both items; on the diagonal with the one item."""
    kept = events.levels >= min_level
    users, rows = np.unique(events.users[kept], return_inverse=True)
    pairs = np.unique(rows.astype(np.int64) * n_items + events.items[kept])  # an item counts once a user
    ones = np.ones(len(pairs), np.float32)
    visits = sp.csr_matrix((ones, (pairs // n_items, pairs % n_items)), shape=(len(users), n_items))
    return (visits.T @ visits).tocsr()


def _similarity(counts_NN: sp.csr_matrix, shrinkage: float, alpha: float, order: Ints) -> Any:
    """s_NN with columns in the given order: a sparse matrix, or an array where too many pairs co-occur."""
    users_N = counts_NN.diagonal()
    pairs = counts_NN.tocoo()
    norms = (users_N ** (1 - alpha))[pairs.row] * (users_N**alpha)[pairs.col]
    values = np.where(pairs.row == pairs.col, 0, pairs.data / (norms + shrinkage)).astype(np.float32)
    column = np.argsort(order)
    similarity_NN = sp.csr_matrix((values, (pairs.row, column[pairs.col])), shape=counts_NN.shape)
    dense = similarity_NN.nnz > _DENSE_ABOVE * len(order) ** 2
    return similarity_NN.toarray() if dense else similarity_NN


def _best(scores_N: Floats, k: int) -> Ints:
    """Columns of the k highest finite scores, the lower column first where scores are equal."""
    candidates = np.arange(len(scores_N))
    if k < len(scores_N):
        threshold = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
        candidates = np.flatnonzero(scores_N >= threshold)
    candidates = candidates[np.isfinite(scores_N[candidates])]
    return candidates[np.argsort(-scores_N[candidates], kind="stable")[:k]]
