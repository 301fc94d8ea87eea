"""Figures of merit over full rankings.

Shape suffixes: U users, K places of a slate, R generated semantic IDs, N items, M levels of a semantic ID.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from components.evaluation.protocol import Cases
from components.retriever.contract import Ints, Recommender
from infra.logs import ProgressMeter

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]


def hit_matrix(rankings: Sequence[Ints], truths: Sequence[Ints], places: int) -> Bools:
    """hits_UK: whether place k of user u holds an item of the user's truth; places past the end of a ranking are misses."""
    hits_UK = np.zeros((len(rankings), places), bool)
    for row, (ranking, truth) in enumerate(zip(rankings, truths, strict=True)):
        top = ranking[:places]
        hits_UK[row, : len(top)] = np.isin(top, truth)
    return hits_UK


def hit_rate(hits_UK: Bools, truth_sizes_U: Ints, k: int) -> Doubles:
    """HR@k of each user: |top-k ∩ truth| / |truth| (RankGR Eq. 19, before the mean).

    With one true item a user, as in leave-one-out, this is 1 where it was found and 0 elsewhere.
    """
    return np.asarray(hits_UK[:, :k].sum(axis=1) / truth_sizes_U, np.float64)


def ndcg(hits_UK: Bools, truth_sizes_U: Ints, k: int) -> Doubles:
    """NDCG@k of each user with binary relevance: sum of 1 / log2(place + 1) over hits, places from 1, over the best such sum.

    The best has min(k, |truth|) hits in the first places (Järvelin and Kekäläinen, 2002).
    """
    discounts_K = 1.0 / np.log2(np.arange(2, k + 2))
    ideal_K = np.cumsum(discounts_K)
    gained_U = hits_UK[:, :k] @ discounts_K[: hits_UK.shape[1]]
    return np.asarray(gained_U / ideal_K[np.minimum(truth_sizes_U, k) - 1], np.float64)


def invalid_rate(generated_RM: Ints, table_NM: Ints) -> float:
    """Share of generated semantic IDs that name no item of the SID table (hallucination rate).

    Raises:
        ValueError: nothing was generated, so that there is no rate.
    """
    if len(generated_RM) == 0:
        raise ValueError("no semantic ID was generated: the invalid rate is not defined")
    known = set(map(tuple, table_NM.tolist()))
    return sum(tuple(codes) not in known for codes in generated_RM.tolist()) / len(generated_RM)


def measure(rankings: Sequence[Ints], cases: Cases, ks: Sequence[int]) -> dict[str, float]:
    """Mean HR@k and NDCG@k of rankings, over the users who have the truth in question.

    Args:
        rankings: for each case item indices, best first, without repetition.
        cases: whom they are for.
        ks: cut-offs.

    Returns:
        `hr@k`, `ndcg@k` for the first truth, `<truth>/hr@k`, `<truth>/ndcg@k` for further ones, each with its standard
        error under `..._se` (from two users on). A truth that no user has gives no keys: what is missing fails the gate.
    """
    figures: dict[str, float] = {}
    for order, (name, truths) in enumerate(cases.truths.items()):
        users = [user for user, truth in enumerate(truths) if len(truth)]
        if not users:
            continue
        sizes_U = np.array([len(truths[user]) for user in users])
        hits_UK = hit_matrix([rankings[user] for user in users], [truths[user] for user in users], max(ks))
        prefix = f"{name}/" if order else ""
        for k in ks:
            figures |= _mean_and_error(f"{prefix}hr@{k}", hit_rate(hits_UK, sizes_U, k))
            figures |= _mean_and_error(f"{prefix}ndcg@{k}", ndcg(hits_UK, sizes_U, k))
    return figures


def evaluate(recommender: Recommender, cases: Cases, ks: Sequence[int], *, batch: int = 256) -> dict[str, float]:
    """Let a method rank the catalogue for every case and measure the rankings; shows rate and ETA.

    Seen items are treated as the cases were built (`Cases.exclude_seen`).

    Args:
        recommender: the method.
        cases: whom to rank for.
        ks: cut-offs; the deepest one is how many items are asked for.
        batch: histories a call.

    Returns:
        the figures of `measure`.
    """
    rankings: list[Ints] = []
    meter = ProgressMeter(len(cases), step="evaluation", unit="users")
    try:
        for start in range(0, len(cases), batch):
            histories = cases.histories[start : start + batch]
            ranked = recommender.recommend(histories, max(ks), exclude_seen=cases.exclude_seen)
            rankings += [items for items, _ in ranked]
            meter.advance(len(histories), method=recommender.name)
    finally:
        meter.close()
    return measure(rankings, cases, ks)


def _mean_and_error(key: str, values_U: Doubles) -> dict[str, float]:
    figures = {key: float(values_U.mean())}
    if len(values_U) > 1:
        figures[f"{key}_se"] = float(values_U.std(ddof=1)) / math.sqrt(len(values_U))
    return figures
