"""K-means over shards, plain or balanced: the codebook of one level.

Plain is Lloyd's algorithm. Balanced ends with clusters whose sizes differ by at most one, as OneRec's Algorithm 1 asks for, at
about the cost of plain k-means. Algorithm 1 as printed sorts all free items once a centroid and leaves the last centroids what
nobody wanted. Here codewords have prices, as in an auction (Bertsekas 1988): an item takes the codeword of least squared
distance plus price, and the price of a crowded codeword rises by as much as makes its surplus prefer their second choice. Prices
live on from pass to pass; what they leave uneven in the end is moved by least regret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from components.semantic_ids.shards import Codebook, Codes, Ints, Matrix, Offers, Shards, add_up, first_of_each, sample_rows, split

_SAMPLE_A_CODE = 8
_FEW_ROWS = 16_384
_SPLIT = 1e-3
MOST_ROWS = 1 << 19  # of crowded clusters that are looked at together
Progress = Callable[[int], None]


def fit_codebook(
    shards: Shards,
    n_codes: int,
    *,
    iterations: int,
    seed: int,
    balanced: bool,
    before_N: Codes | None = None,
    tell: Progress = lambda _: None,
) -> Codebook:
    """Find the codewords of what is left of the rows, and leave each shard's rows assigned to them.

    Args:
        shards: at least `n_codes` rows.
        n_codes: K.
        iterations: passes that move the codewords, at most; fewer where nothing changes any more.
        seed: of the first codewords.
        balanced: clusters of floor(N/K) or ceil(N/K) rows.
        before_N: codes of an earlier fit, -1 where there is none: clusters start as they were, so that codes last where they can.
            By default k-means++ on a sample of rows.
        tell: called with the number of each pass.

    Returns:
        the codewords, means of their rows, and their prices.
    """
    rng = np.random.default_rng(seed)
    codebook = Codebook.free(first_codewords(shards, n_codes, rng) if before_N is None else _as_before(shards, before_N, n_codes, rng))
    for number in range(iterations):
        tell(number)
        sums_KD, counts_K, changed = shards.add_up("assign", codebook, balanced)
        if not changed.item():
            return _settled(shards, codebook) if balanced else codebook
        prices_K = codebook.prices_K
        if balanced:
            prices_K = prices_K + _raises(shards, counts_K)
        codebook = Codebook(_means(sums_KD, counts_K, codebook.codewords_KD, rng), prices_K - prices_K.min())
    shards.add_up("assign", codebook, balanced)
    return _settled(shards, codebook) if balanced else codebook


def first_codewords(shards: Shards, n_codes: int, rng: np.random.Generator) -> Matrix:
    """k-means++ (Arthur and Vassilvitskii 2007): greedy on all rows where they are few, plain on a sample where they are many."""
    total = int(shards.sizes.sum())
    _, rows_nD = sample_rows(shards, sample_size(total, n_codes), rng)
    return _spread(rows_nD, n_codes, rng, tries=2 + int(np.log(n_codes)) if len(rows_nD) == total else 1)


def sample_size(rows: int, n_codes: int) -> int:
    """Of how many rows codewords are chosen to start from: of all, where they are few."""
    return rows if rows <= _FEW_ROWS else min(rows, max(_SAMPLE_A_CODE * n_codes, _FEW_ROWS // 4))


def _as_before(shards: Shards, before_N: Codes, n_codes: int, rng: np.random.Generator) -> Matrix:
    """Means of earlier clusters in today's features, which need not have the same axes as the earlier ones."""
    # One after the other: the sums of all shards together may be larger than memory.
    sums_KD, counts_K = add_up(shards.one(at, "sums_of", codes, n_codes) for at, codes in enumerate(split(before_N, shards.sizes)))
    others_KD = first_codewords(shards, n_codes, rng)  # for codes that nothing has any more
    return _centroids(sums_KD, counts_K, others_KD).astype(np.float32)


def _spread(rows_nD: Matrix, n_codes: int, rng: np.random.Generator, *, tries: int) -> Matrix:
    """Rows that lie far apart: candidates are drawn with a chance that grows with the squared distance to those chosen before,
    and of so many tries the one is taken that leaves the least.
    """
    squared = np.einsum("nd,nd->n", rows_nD, rows_nD)
    # x and c with two columns more each, whose product is their squared distance.
    rows = np.concatenate([-2 * rows_nD, squared[:, None], np.ones((len(rows_nD), 1), np.float32)], axis=1).T.copy()
    centres = np.concatenate([rows_nD, np.ones((len(rows_nD), 1), np.float32), squared[:, None]], axis=1)
    chosen = [int(rng.integers(len(rows_nD)))]
    with threadpool_limits(1, "blas"):
        distance = np.maximum(centres[chosen[0]] @ rows, 0)
        for _ in range(n_codes - 1):
            distance[chosen[-1]] = 0
            mass = np.cumsum(distance, dtype=np.float64)
            # Where no row is left that differs from all chosen ones, any will do.
            drawn = rng.random(tries) * mass[-1] if mass[-1] > 0 else np.full(tries, np.inf)
            candidates = np.minimum(np.searchsorted(mass, drawn, side="right"), len(rows_nD) - 1)
            left = centres[candidates] @ rows
            np.clip(left, 0, distance, out=left)
            best = int(left.sum(axis=1).argmin())
            distance = left[best].copy()
            chosen.append(int(candidates[best]))
    return rows_nD[chosen].copy()


def _means(sums_KD: npt.NDArray[np.float64], counts_K: Ints, before_KD: Matrix, rng: np.random.Generator) -> Matrix:
    """Centroids; a codeword that nobody took becomes half of one that many took."""
    means = _centroids(sums_KD, counts_K, before_KD)
    empty = np.flatnonzero(counts_K == 0)
    if len(empty):
        spare = np.maximum(counts_K - 1, 0)
        donors = np.lexsort((np.arange(len(spare)), -spare))[: len(empty)]
        nudge = _SPLIT * rng.standard_normal((len(donors), means.shape[1])) * np.abs(means[donors]).mean(1, keepdims=True)
        means[empty[: len(donors)]] = means[donors] + nudge
        means[donors] -= nudge
    return means.astype(np.float32)


def _centroids(sums_KD: npt.NDArray[np.float64], counts_K: Ints, otherwise_KD: Matrix) -> npt.NDArray[np.float64]:
    """Means of clusters; what is given for those without a row."""
    return np.where(counts_K[:, None] > 0, sums_KD / np.maximum(counts_K, 1)[:, None], otherwise_KD)


def _raises(shards: Shards, counts_K: Ints) -> Matrix:
    """What crowded codewords' prices rise by: the largest of the surplus' slacks, so that they prefer their second choice."""
    raises = np.zeros(len(counts_K), np.float32)
    for excess_K in _portions(np.maximum(counts_K - -(-counts_K.sum() // len(counts_K)), 0), counts_K):
        found = shards.every("smallest_slacks", excess_K)
        clusters = np.concatenate([part[0] for part in found])
        slacks = np.concatenate([part[1] for part in found])
        order = np.lexsort((slacks, clusters))
        clusters, slacks = clusters[order], slacks[order]
        kept = first_of_each(clusters, excess_K)
        np.maximum.at(raises, clusters[kept], slacks[kept])
    return raises


def _portions(excess_K: Ints, counts_K: Ints) -> Iterator[Ints]:
    """The excess of some crowded clusters after the other: of so many that their rows are `MOST_ROWS` or a cluster's."""
    crowded = np.flatnonzero(excess_K)
    portion = np.cumsum(counts_K[crowded]) // MOST_ROWS
    for number in np.unique(portion) if len(crowded) else [0]:
        own_K = np.zeros_like(excess_K)
        own_K[crowded[portion == number]] = excess_K[crowded[portion == number]]
        yield own_K


def capacities(counts_K: Ints) -> Ints:
    """Sizes that differ by at most one and add up to the same; the fullest clusters take the remainder."""
    size, remainder = divmod(int(counts_K.sum()), len(counts_K))
    sizes = np.full(len(counts_K), size)
    sizes[np.lexsort((np.arange(len(counts_K)), -counts_K))[:remainder]] += 1
    return sizes


def _settled(shards: Shards, codebook: Codebook) -> Codebook:
    """Move surplus rows, the ones that mind least first, until every cluster has its size; returns the means of what came out.

    Clusters with too many rows offer the cheapest ones to clusters with room. Where all that a row listed are full by the time its
    turn comes, what is left is offered anew.
    """
    n_codes = len(codebook.codewords_KD)
    _, counts_K = shards.add_up("sums", n_codes)
    sizes_K = capacities(counts_K)
    while (counts_K > sizes_K).any():
        excess_K = next(_portions(np.maximum(counts_K - sizes_K, 0), counts_K))
        found: list[Offers] = shards.every("offers", codebook, excess_K, np.maximum(sizes_K - counts_K, 0))
        lengths = np.array([len(offers.rows) for offers in found])
        offers = Offers.joined(found)
        del found  # where many rows have to move, all their offers once more would be much
        targets, counts_K = _placed(offers, np.repeat(np.arange(len(lengths)), lengths), counts_K, sizes_K)
        moves = zip(split(offers.rows, lengths), split(targets, lengths), strict=True)
        shards.each("move", [(rows[codes >= 0], codes[codes >= 0]) for rows, codes in moves])
    sums_KD, counts_K = shards.add_up("sums", n_codes)
    return Codebook(_centroids(sums_KD, counts_K, codebook.codewords_KD).astype(np.float32), codebook.prices_K)


def _placed(offers: Offers, of_shard: Ints, counts_K: Ints, sizes_K: Ints) -> tuple[Ints, Ints]:
    """Let rows bid for the cheapest cluster on their list that has room, which takes the best bids, round after round.

    Returns:
        targets_n, -1 for rows that stay, and counts_K after the moves. Each round fills a cluster or empties all surplus.
    """
    result, here = np.full(len(offers.rows), -1), np.arange(len(offers.rows))
    while True:
        room_K, excess_K = sizes_K - counts_K, counts_K - sizes_K
        costs = np.where((room_K > 0)[offers.targets], offers.regrets, np.inf)
        choice = costs.argmin(1)
        regrets, targets = costs[here, choice], offers.targets[here, choice]
        bids = np.flatnonzero((result < 0) & np.isfinite(regrets) & (excess_K[offers.sources] > 0))
        if not len(bids):
            return result, counts_K
        for groups, limits in ((offers.sources, excess_K), (targets, room_K)):
            bids = bids[np.lexsort((offers.rows[bids], of_shard[bids], regrets[bids], groups[bids]))]
            bids = bids[first_of_each(groups[bids], limits)]
        result[bids] = targets[bids]
        leaving, coming = (np.bincount(clusters[bids], minlength=len(counts_K)) for clusters in (offers.sources, targets))
        counts_K = counts_K - leaving + coming
