"""The benchmark of quantizers compares like with like."""

from __future__ import annotations

import time

import numpy as np
import pytest

from components.semantic_ids.shards import ROWS
from tests.benchmarks.semantic_ids import by_faiss, by_flow, by_us, inertia, mixture, peak_memory, simulate, spread


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


def test_a_simulation_goes_all_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    simulate(ROWS + 100, 32, levels=3, iterations=2, threads=1)
    shown = capsys.readouterr().out
    assert "12 passes and" in shown
    assert "then 0.0000" in shown


def test_memory_that_is_given_back_was_measured() -> None:
    with peak_memory() as grown:
        held = np.ones(1 << 23)
        assert held.all()
        deadline = time.monotonic() + 10
        while grown[0] < 50 << 20 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert grown[0] >= 50 << 20
