"""Quantizers against faiss and k-means-constrained: `python -m tests.benchmarks.semantic_ids [--quick] [--write]`.

1. 100,000 vectors of width 64, 1,024 codewords, 25 passes: plain k-means of faiss (on all vectors) against ours, plain and
   balanced; and two levels of residual k-means, where the peer is faiss on the vectors and then on its residuals.
2. Balanced clusters of 20,000 vectors, 256 codewords, 10 passes: `k-means-constrained`, which solves a minimum-cost flow a pass,
   at a size that it can finish.
3. Cost by number of items (10,000 to 1,000,000), with collisions resolved.
4. `--simulate [ITEMS]`: vectors in a file, by default of 10,000,000 items, and with a few blocks in memory the fit of three levels,
   collisions and statistics: time, passes and memory beside what `rankgr sids plan` says.

Inertia is the sum of squared distances to the codewords, everywhere computed here. Threads (`--threads`) hold for all sides alike.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import psutil
from k_means_constrained import KMeansConstrained
from threadpoolctl import threadpool_limits

from components.semantic_ids.blocks import filled, scratch
from components.semantic_ids.collisions import resolve_collisions
from components.semantic_ids.kmeans import fit_codebook
from components.semantic_ids.plan import plan_of
from components.semantic_ids.quantize import ResidualKMeans
from components.semantic_ids.shards import ROWS, LocalShards, Matrix
from components.semantic_ids.stats import sid_statistics
from infra.sections import SemanticIdConfig
from tests.benchmarks.timing import Side, announce, clock_for, console, finish, interleave, milliseconds, parse, table, times

WIDTH = 64
ITERATIONS = 25


@dataclass(frozen=True)
class Fit:
    """What a side found."""

    codes_N: np.ndarray
    codewords_KD: Matrix


def mixture(rows: int, *, centres: int = 3000, seed: int = 0) -> Matrix:
    """Vectors around random centres, as embeddings of items of many kinds are."""
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((centres, WIDTH), np.float32)
    return middles[rng.integers(0, centres, rows)] + 0.7 * rng.standard_normal((rows, WIDTH), np.float32)


def by_faiss(vectors: Matrix, codes: int, iterations: int) -> Fit:
    """Lloyd's algorithm of faiss on all vectors, and the assignment to what it found."""
    fitted = faiss.Kmeans(WIDTH, codes, niter=iterations, max_points_per_centroid=len(vectors), seed=1)
    fitted.train(vectors)
    _, found = fitted.index.search(vectors, 1)
    return Fit(found[:, 0], fitted.centroids)


def by_us(vectors: Matrix, codes: int, iterations: int, *, balanced: bool, threads: int) -> Fit:
    """Ours: one level."""
    shards = LocalShards(vectors, threads=threads)
    codebook = fit_codebook(shards, codes, iterations=iterations, seed=1, balanced=balanced)
    return Fit(np.concatenate(shards.every("finish_level", codebook.codewords_KD)), codebook.codewords_KD)


def by_flow(vectors: Matrix, codes: int, iterations: int) -> Fit:
    """k-means-constrained with clusters of floor(N/K) or ceil(N/K) vectors."""
    low, high = len(vectors) // codes, -(-len(vectors) // codes)
    peer = KMeansConstrained(codes, size_min=low, size_max=high, n_init=1, max_iter=iterations, random_state=1, init="random")
    peer.fit(vectors)
    return Fit(peer.labels_, peer.cluster_centers_)


def inertia(vectors: Matrix, fit: Fit) -> float:
    """Sum of squared distances."""
    return float(((vectors - fit.codewords_KD[fit.codes_N]) ** 2).sum(dtype=np.float64))


def spread(fit: Fit) -> int:
    """Largest less smallest cluster."""
    sizes = np.bincount(fit.codes_N, minlength=len(fit.codewords_KD))
    return int(sizes.max() - sizes.min())


def one_level(vectors: Matrix, codes: int, *, rounds: int, threads: int) -> dict[str, float]:
    """faiss, ours plain, ours balanced: time, inertia, balance."""
    sides: dict[str, Callable[[], Fit]] = {
        "faiss": lambda: by_faiss(vectors, codes, ITERATIONS),
        "ours, plain": lambda: by_us(vectors, codes, ITERATIONS, balanced=False, threads=threads),
        "ours, balanced": lambda: by_us(vectors, codes, ITERATIONS, balanced=True, threads=threads),
    }
    fits: dict[str, Fit] = {}
    seconds = _timed(sides, fits, rounds)
    lost = {name: inertia(vectors, fit) for name, fit in fits.items()}
    rows = [
        [name, milliseconds(seconds[name]), times(seconds[name] / seconds["faiss"]), f"{lost[name] / lost['faiss']:.4f}", str(spread(fit))]
        for name, fit in fits.items()
    ]
    title = f"{len(vectors):,} x {WIDTH}, {codes:,} codewords, {ITERATIONS} passes"
    table(title, ["", "time", "of faiss", "inertia, of faiss", "largest - smallest"], rows)
    return {
        "plain_over_faiss_time": seconds["ours, plain"] / seconds["faiss"],
        "balanced_over_faiss_time": seconds["ours, balanced"] / seconds["faiss"],
        "balanced_over_plain_inertia": lost["ours, balanced"] / min(lost["ours, plain"], lost["faiss"]),
        "max_minus_min": float(spread(fits["ours, balanced"])),
    }


def two_levels(vectors: Matrix, codes: int, *, rounds: int, threads: int) -> float:
    """Residual k-means: seconds of ours over those of faiss level by level."""

    def peer() -> Fit:
        first = by_faiss(vectors, codes, ITERATIONS)
        return by_faiss(vectors - first.codewords_KD[first.codes_N], codes, ITERATIONS)

    def ours() -> Fit:
        quantizer = ResidualKMeans(2, codes, ITERATIONS, seed=1)
        found = quantizer.fit(LocalShards(vectors, threads=threads))
        return Fit(found[:, 1], quantizer.codebooks[1].codewords_KD)

    seconds = _timed({"faiss": peer, "ours": ours}, {}, rounds)
    ratio = seconds["ours"] / seconds["faiss"]
    rows = [["faiss", milliseconds(seconds["faiss"]), ""], ["ours", milliseconds(seconds["ours"]), times(ratio)]]
    table(f"Residual k-means, 2 levels, {len(vectors):,} x {WIDTH}, {codes:,} codewords", ["", "time", "of faiss"], rows)
    return ratio


def against_flow(rows: int, codes: int, *, iterations: int = 10) -> float:
    """Seconds of k-means-constrained over ours, one thread each."""
    vectors = mixture(rows, centres=3 * codes)
    fits: dict[str, Fit] = {}
    sides = {
        "k-means-constrained": lambda: by_flow(vectors, codes, iterations),
        "ours, balanced": lambda: by_us(vectors, codes, iterations, balanced=True, threads=1),
    }
    with threadpool_limits(1):
        seconds = _timed(sides, fits, 1)
    shown = [[name, milliseconds(seconds[name]), f"{inertia(vectors, fit):,.0f}", str(spread(fit))] for name, fit in fits.items()]
    title = f"Balanced clusters, {rows:,} x {WIDTH}, {codes} codewords, {iterations} passes, one thread"
    table(title, ["", "time", "inertia", "largest - smallest"], shown)
    return seconds["k-means-constrained"] / seconds["ours, balanced"]


def by_items(counts: list[int], codes: int, *, threads: int) -> float:
    """Cost by number of items; returns the largest cost an item over the smallest."""
    clock, rows, costs = clock_for("cpu"), [], []
    for count in counts:
        vectors = mixture(count)
        start = clock()
        quantizer = ResidualKMeans(2, codes, 10, seed=1, balanced=True)
        found = quantizer.fit(LocalShards(vectors, threads=threads))
        fitted = clock()
        resolve_collisions(found, vectors, quantizer.codebooks, np.arange(count), capacity=max(1, 2 * count // codes**2))
        end = clock()
        costs.append((end - start) / count)
        rows.append([f"{count:,}", milliseconds(fitted - start), milliseconds(end - fitted), f"{1e6 * costs[-1]:.1f}"])
    table(f"2 x {codes:,} balanced codewords, 10 passes a level", ["items", "fit", "collisions", "microseconds an item"], rows)
    return max(costs) / min(costs)


class Counting(LocalShards):
    """Counts passes."""

    def __init__(self, rows_ND: Matrix, *, threads: int) -> None:
        super().__init__(rows_ND, threads=threads)
        self.calls = Counter[str]()

    def _results(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        self.calls[method] += 1
        return super()._results(method, arguments)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Inside, and afterwards, the one entry is by how many bytes this process has grown at most; pages of files do not count."""
    process, grown, stop = psutil.Process(), [0], threading.Event()

    def anonymous() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    def watch(before: int) -> None:
        while not stop.wait(0.02):
            grown[0] = max(grown[0], anonymous() - before)

    watcher = threading.Thread(target=watch, args=(anonymous(),), daemon=True)
    watcher.start()
    try:
        yield grown
    finally:
        stop.set()
        watcher.join()


def simulate(rows: int, codes: int, *, levels: int, iterations: int, threads: int) -> None:
    """A catalogue's vectors in a file, and all that follows: what the plan says, and what was measured."""
    settings = SemanticIdConfig(levels=levels, codes=codes, iterations=iterations, collaborative_weight=0)
    table(f"Plan: {rows:,} x {WIDTH}, {levels} x {codes:,} balanced codewords", ["", ""], plan_of(rows, WIDTH, settings).rows())
    shown, start = list[list[str]](), time.perf_counter()

    def took(name: str) -> None:
        nonlocal start
        shown.append([name, f"{time.perf_counter() - start:,.0f} s", f"{grown[0] / 2**20:,.0f} MiB"])
        console.print(*shown[-1], highlight=False)
        start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, scratch(folder) as new, peak_memory() as grown:
        vectors = filled(new, rows, (mixture(min(ROWS, rows - first), seed=first) for first in range(0, rows, ROWS)))
        took("vectors, into a file")
        shards, quantizer = Counting(vectors, threads=threads), ResidualKMeans(levels, codes, iterations, balanced=True)
        found = quantizer.fit(shards)
        took("fit")
        popularity = np.random.default_rng(0).permutation(rows)
        final = resolve_collisions(found, vectors, quantizer.codebooks, popularity, capacity=1)
        took("collisions")
        stats = sid_statistics(vectors, found, final, quantizer)
        took("statistics")
    table("Measured", ["", "time", "memory so far"], shown)
    passes, more = (sum(shards.calls[name] for name in names) for names in (("pick", "assign"), ("sums", "offers")))
    told = (
        f"{passes} passes and {more} that settle balanced levels; collision rate {stats['collision_rate_before']:.4f}, "
        f"{stats['moved']:,} items moved, then {stats['collision_rate']:.4f}"
    )
    console.print(told, highlight=False, soft_wrap=True)


def _timed(sides: dict[str, Callable[[], Fit]], fits: dict[str, Fit], rounds: int) -> dict[str, float]:
    """Median seconds; what each side found goes into `fits`."""

    def keep(name: str) -> None:
        fits[name] = sides[name]()

    return interleave({name: Side(lambda name=name: keep(name), rounds) for name in sides}, clock_for("cpu"))  # type: ignore[misc]


def _extra(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--simulate",
        type=int,
        nargs="?",
        const=10_000_000,
        default=0,
        metavar="ITEMS",
        help="a large catalogue too, by default of 10,000,000",
    )


def main() -> None:
    """Print the tables and the result."""
    arguments = parse(__doc__, extra=_extra)
    announce()
    quick, threads = arguments.quick, arguments.threads
    faiss.omp_set_num_threads(threads)
    with threadpool_limits(threads, "blas"):
        vectors = mixture(30_000 if quick else 100_000)
        found = one_level(vectors, 512 if quick else 1024, rounds=1 if quick else 3, threads=threads)
        ratio = two_levels(vectors, 512 if quick else 1024, rounds=1 if quick else 3, threads=threads)
        constrained = against_flow(*((5000, 64) if quick else (20_000, 256)))
        growth = by_items([10_000, 30_000] if quick else [10_000, 100_000, 1_000_000], 256, threads=threads)
        if arguments.simulate:
            simulate(arguments.simulate, 1024, levels=3, iterations=5, threads=threads)
    result = {
        "bench": "semantic_ids",
        "balanced_vs_constrained": constrained,
        "balanced_over_faiss_time": found["balanced_over_faiss_time"],
        "balanced_over_plain_inertia": found["balanced_over_plain_inertia"],
        "rq_over_faiss_time": ratio,
        "max_minus_min": int(found["max_minus_min"]),
        "cost_growth": growth,
    }
    finish(result, arguments)


if __name__ == "__main__":
    main()
