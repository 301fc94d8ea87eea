"""Rows of vectors in shards, and what a pass over a shard computes: the work that threads or Ray actors share.

A pass never needs more than one shard's rows and a block of distances, and hands back partial sums. Shapes: n rows of a shard,
D their width, K codewords.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from threadpoolctl import ThreadpoolController

Matrix = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
ROWS = 8192
KEPT_BYTES = 64 << 20  # of rows, that a process holds in memory; where it has more, it reads them anew in each pass
_TARGETS = 16  # clusters that a row in surplus may choose among before rows are looked at again
BLOCK = 512  # rows of distances at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Codebook:
    """Codewords of one level, and what each costs.

    Attributes:
        codewords_KD: the centroids.
        prices_K: added to the squared distance to a codeword; all zero unless clusters are balanced.
    """

    codewords_KD: Matrix
    prices_K: Matrix

    @staticmethod
    def free(codewords_KD: Matrix) -> Codebook:
        """Codewords without prices."""
        return Codebook(codewords_KD, np.zeros(len(codewords_KD), np.float32))


@dataclass(frozen=True)
class Offers:
    """Rows that could leave a cluster which is too full.

    Attributes:
        rows: their numbers in the shard.
        sources: the clusters that they are in.
        targets: nT, where they would go: the cheapest clusters with room, in this order.
        regrets: nT, by how much those are worse for them.
    """

    rows: Ints
    sources: Ints
    targets: Codes
    regrets: Matrix

    @staticmethod
    def joined(found: Sequence[Offers]) -> Offers:
        """Those of all shards, one after the other."""
        return Offers(*(np.concatenate([getattr(offers, part.name) for offers in found]) for part in fields(Offers)))


def nearest(rows_nD: Matrix, codebook: Codebook, *, runner_up: bool = False) -> tuple[Codes, Matrix]:
    """The cheapest codeword of each row, by squared distance plus price.

    Returns:
        codes_n, and with `runner_up` by how much the second cheapest is worse, slack_n; else an empty array.
    """
    weights_DK, offset_K = _weights(codebook)
    weights = np.concatenate([weights_DK, offset_K[None]])  # a column of ones in the rows adds the offset within the product
    codes = np.empty(len(rows_nD), np.int32)
    slack = np.empty(len(rows_nD) if runner_up else 0, np.float32)
    buffer = np.empty((BLOCK, len(offset_K)), np.float32)
    block = np.ones((BLOCK, len(weights)), np.float32)
    for start in range(0, len(rows_nD), BLOCK):
        rows = block[: len(rows_nD[start : start + BLOCK])]
        rows[:, :-1] = rows_nD[start : start + BLOCK]
        cost, here = buffer[: len(rows)], np.arange(len(rows))
        np.dot(rows, weights, out=cost)
        best = cost.argmin(1)
        codes[start : start + len(rows)] = best
        if runner_up:
            lowest = cost[here, best]
            cost[here, best] = np.inf
            slack[start : start + len(rows)] = cost.min(1) - lowest
    return codes, slack


def squared_distances(vectors_nD: Matrix, codewords_KD: Matrix) -> Matrix:
    """distances_nK between vectors and codewords."""
    cross = vectors_nD @ codewords_KD.T
    return np.asarray((vectors_nD**2).sum(1)[:, None] - 2 * cross + (codewords_KD**2).sum(1)[None], dtype=np.float32)


def _weights(codebook: Codebook) -> tuple[Matrix, Matrix]:
    """|x - c|^2 + price without |x|^2, which no choice depends on: x @ weights + offset."""
    squared = (codebook.codewords_KD.astype(np.float64) ** 2).sum(1)
    return np.ascontiguousarray(-2 * codebook.codewords_KD.T), (squared + codebook.prices_K).astype(np.float32)


class Shard:
    """Some rows, what the levels found so far left of them, and the codes of those levels."""

    def __init__(self, load: Callable[[], Matrix], *, keep: bool) -> None:
        """Describe a shard; nothing is read yet.

        Args:
            load: reads the rows_nD.
            keep: hold what is left of the rows in memory; otherwise they are read once a pass.
        """
        self._load, self._keep = load, keep
        self._left: Matrix | None = None
        self._held: Matrix | None = None
        self._levels: list[tuple[Codes, Matrix]] = []
        self._codes = np.empty(0, np.int32)
        self._slack = np.empty(0, np.float32)

    def residual(self) -> Matrix:
        """rows_nD less the codewords of the finished levels."""
        if self._left is not None:
            return self._left
        rows = self._load().astype(np.float32, copy=True)
        for codes, codewords_KD in self._levels:
            rows -= codewords_KD[codes]
        self._left = rows if self._keep else None
        return rows

    def pick(self, rows: Ints) -> Matrix:
        """Those rows."""
        return (self.residual() if self._held is None else self._held)[rows]

    def hold(self, held: bool) -> None:
        """Have the rows in memory for many small picks, or no longer."""
        self._held = self.residual() if held else None

    def apply(self, compute: Callable[[Matrix], Any], rows: Ints | None = None) -> Any:
        """What `compute` makes of all rows, or of those."""
        return compute(self.residual() if rows is None else self.pick(rows))

    def assign(self, codebook: Codebook, runner_up: bool) -> tuple[npt.NDArray[np.float64], Ints, Ints]:
        """Give each row its cheapest codeword; returns sums_KD and counts_K of the clusters and how many rows changed theirs."""
        rows = self.residual()
        before = self._codes
        self._codes, self._slack = nearest(rows, codebook, runner_up=runner_up)
        changed = int((self._codes != before).sum()) if len(before) == len(self._codes) else len(rows)
        return (*_sums(rows, self._codes, len(codebook.codewords_KD)), np.array([changed]))

    def sums(self, n_codes: int) -> tuple[npt.NDArray[np.float64], Ints]:
        """sums_KD and counts_K of the clusters as they are."""
        return _sums(self.residual(), self._codes, n_codes)

    def sums_of(self, codes_n: Codes, n_codes: int) -> tuple[npt.NDArray[np.float64], Ints]:
        """sums_KD and counts_K of other clusters; rows with code -1 belong to none."""
        known = codes_n >= 0
        return _sums(self.residual()[known], codes_n[known], n_codes)

    def smallest_slacks(self, excess_K: Ints) -> tuple[Ints, Matrix]:
        """The slacks of each cluster's rows, the smallest `excess` of it: their clusters, rising, and the slacks, rising in each."""
        rows = np.flatnonzero(excess_K[self._codes] > 0)
        rows = rows[np.lexsort((self._slack[rows], self._codes[rows]))]
        clusters = self._codes[rows].astype(np.int64)
        kept = first_of_each(clusters, excess_K)
        return clusters[kept], self._slack[rows[kept]]

    def offers(self, codebook: Codebook, excess_K: Ints, room_K: Ints) -> Offers:
        """For each cluster with an excess, as many rows as that whom it costs least to move to clusters with room."""
        rows = np.flatnonzero(excess_K[self._codes] > 0)
        there = np.flatnonzero(room_K > 0)
        left, sources = self.residual()[rows], self._codes[rows].astype(np.int64)
        weights_DK, offset_K = _weights(codebook)
        now = np.einsum("nd,nd->n", left, weights_DK.T[sources]) + offset_K[sources]
        listed = min(_TARGETS, len(there))
        targets, regrets = np.empty((len(rows), listed), np.int32), np.empty((len(rows), listed), np.float32)
        open_weights, open_offset = np.ascontiguousarray(weights_DK[:, there]), offset_K[there]
        for start in range(0, len(rows), BLOCK):
            cost = left[start : start + BLOCK] @ open_weights + open_offset
            best = np.argpartition(cost, listed - 1, axis=1)[:, :listed]
            costs = np.take_along_axis(cost, best, 1)
            order = np.lexsort((best, costs), axis=1)
            targets[start : start + len(best)] = there[np.take_along_axis(best, order, 1)]
            regrets[start : start + len(best)] = np.take_along_axis(costs, order, 1) - now[start : start + len(best), None]
        order = np.lexsort((rows, regrets[:, 0], sources))
        order = order[first_of_each(sources[order], excess_K)]
        return Offers(rows[order], sources[order], targets[order], regrets[order])

    def move(self, rows: Ints, targets: Codes) -> None:
        """Put rows into other clusters."""
        self._codes[rows] = targets

    def finish_level(self, codewords_KD: Matrix) -> Codes:
        """Take the codes as this level's, go on with what its codewords leave over; returns codes_n."""
        codes, self._codes = self._codes, np.empty(0, np.int32)
        if self._left is not None:
            self._left -= codewords_KD[codes]
        self._levels.append((codes, codewords_KD))
        return codes


def _sums(rows_nD: Matrix, codes_n: Codes, n_codes: int) -> tuple[npt.NDArray[np.float64], Ints]:
    members = sp.csr_matrix((np.ones(len(rows_nD), np.float32), codes_n, np.arange(len(rows_nD) + 1)), (len(rows_nD), n_codes))
    return (members.T @ rows_nD).astype(np.float64), np.bincount(codes_n, minlength=n_codes)


def first_of_each(groups: Ints, limits: Ints) -> npt.NDArray[np.bool_]:
    """Of rows that are sorted by group, the first `limits[group]` of each."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups) < limits[groups]


class Shards(Protocol):
    """All shards, wherever they lie."""

    sizes: Ints

    def add_up(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a method of each shard that returns a tuple of arrays; their sums."""
        ...

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of each shard with arguments of its own; the results in the order of the shards."""
        ...

    def every(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of each shard with the same arguments."""
        ...

    def one(self, shard: int, method: str, *arguments: Any) -> Any:
        """Call a method of one shard."""
        ...

    def together(self, compute: Callable[[Matrix], Any], rows: Mapping[int, Ints]) -> list[Any]:
        """What `compute` makes of the rows that a process has, all of them at once; the results of those that have any.

        Args:
            compute: of rows_nD, in the order of the shards, to what is sent back.
            rows: numbers of rows, by shard. Processes have consecutive shards, so that results of rows join in this order.
        """
        ...


class LocalShards:
    """Shards in this process, worked on by threads; results do not depend on how many there are."""

    def __init__(self, rows_ND: Matrix, *, threads: int = 1, rows: int = ROWS) -> None:
        """Cut a matrix, in memory or in a file, into shards; what is left of the rows is held in memory up to `KEPT_BYTES`."""
        parts = [rows_ND[start : start + rows] for start in range(0, len(rows_ND), rows)]
        keep = rows_ND.nbytes <= KEPT_BYTES
        self._shards = [Shard(lambda part=part: part, keep=keep) for part in parts]  # type: ignore[misc]
        self.sizes = np.array([len(part) for part in parts])
        self._threads, self._blas = threads, ThreadpoolController()

    def add_up(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        """Sums over shards."""
        return add_up(self._results(method, [arguments] * len(self._shards)))

    def every(self, method: str, *arguments: Any) -> list[Any]:
        """The same call for all."""
        return self.each(method, [arguments] * len(self._shards))

    def one(self, shard: int, method: str, *arguments: Any) -> Any:
        """A call for one."""
        return getattr(self._shards[shard], method)(*arguments)

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """A call for each."""
        return list(self._results(method, arguments))

    def together(self, compute: Callable[[Matrix], Any], rows: Mapping[int, Ints]) -> list[Any]:
        """One process, one result."""
        return [compute(picked(self._shards, rows))]

    def _results(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        calls = list(zip(self._shards, arguments, strict=True))
        # The order of sums in a matrix product, and with it near ties, would change with the number of BLAS threads.
        with self._blas.limit(limits=1, user_api="blas"):
            if self._threads == 1:
                yield from (getattr(shard, method)(*own) for shard, own in calls)
                return
            with ThreadPoolExecutor(self._threads) as pool:
                yield from pool.map(lambda call: getattr(call[0], method)(*call[1]), calls)


def split(rows: npt.NDArray[Any], sizes: Ints) -> list[npt.NDArray[Any]]:
    """The part of each shard of something that has an entry a row."""
    return np.split(rows, np.cumsum(sizes)[:-1])


def sample_rows(shards: Shards, most: int, rng: np.random.Generator) -> tuple[Ints, Matrix]:
    """So many random rows, or all of them: their numbers, rising, and rows_nD."""
    chosen, parts = chosen_rows(shards, most, rng)
    return chosen, np.concatenate(shards.each("pick", [(part,) for part in parts]))


def chosen_rows(shards: Shards, most: int, rng: np.random.Generator) -> tuple[Ints, list[Ints]]:
    """Numbers of so many random rows, or of all of them, rising; and as numbers within each shard."""
    total = int(shards.sizes.sum())
    chosen = np.sort(rng.choice(total, min(total, most), replace=False))
    ends = np.cumsum(shards.sizes)
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return chosen, [part - first for part, first in zip(parts, ends - shards.sizes, strict=True)]


def picked(shards: Sequence[Shard], rows: Mapping[int, Ints]) -> Matrix:
    """Rows of some shards, in the order of the shards."""
    return np.concatenate([shards[shard].pick(rows[shard]) for shard in sorted(rows)])


def add_up(results: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Sums of tuples of arrays, from left to right."""
    rest = iter(results)
    total = list(next(rest))
    for result in rest:
        for at, value in enumerate(result):
            total[at] = total[at] + value
    return tuple(total)
