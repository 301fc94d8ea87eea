"""The benchmark of quantizers compares like with like."""

from __future__ import annotations

import numpy as np

from tests.benchmarks.semantic_ids import by_faiss, by_flow, by_us, inertia, mixture, spread


def test_both_balanced_sides_balance_and_lose_about_the_same() -> None:
    vectors = mixture(300, centres=6)
    ours, peer = by_us(vectors, 6, 10, balanced=True, threads=1), by_flow(vectors, 6, 10)
    assert (spread(ours), spread(peer)) == (0, 0)
    assert inertia(vectors, ours) <= 1.1 * inertia(vectors, peer)


def test_both_plain_sides_take_the_nearest_codeword_of_all_vectors() -> None:
    vectors = mixture(400, centres=5)
    for fit in (by_us(vectors, 8, 10, balanced=False, threads=1), by_faiss(vectors, 8, 10)):
        distances = ((vectors[:, None] - fit.codewords_KD[None]) ** 2).sum(2)
        assert np.mean(distances.argmin(1) == fit.codes_N) > 0.99
