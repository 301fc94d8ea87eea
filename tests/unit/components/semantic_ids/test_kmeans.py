"""K-means over shards: the obvious reference, exact balance, the same result however rows are cut and whoever computes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.semantic_ids import kmeans
from components.semantic_ids.kmeans import capacities, fit_codebook
from components.semantic_ids.shards import Codebook, LocalShards, first_of_each, nearest


def vectors(rows: int = 300, width: int = 4, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def fitted(
    rows: np.ndarray, codes: int, *, balanced: bool, cut: int = 64, threads: int = 1, iterations: int = 25
) -> tuple[np.ndarray, Codebook]:
    shards = LocalShards(rows, rows=cut, threads=threads)
    codebook = fit_codebook(shards, codes, iterations=iterations, seed=0, balanced=balanced)
    return np.concatenate(shards.every("finish_level", codebook.codewords_KD)), codebook


class Counting(LocalShards):
    """Counts calls."""

    calls: Counter[str] = Counter()

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.calls[method] += 1
        return super().each(method, arguments)


def inertia(rows: np.ndarray, codes: np.ndarray, codewords: np.ndarray) -> float:
    return float(((rows - codewords[codes]) ** 2).sum())


def best_balanced_split(rows: np.ndarray) -> float:
    """Least inertia of two clusters of equal size, by trying all."""
    half = len(rows) // 2
    splits = (np.isin(np.arange(len(rows)), chosen) for chosen in itertools.combinations(range(len(rows)), half))
    return min(sum(((part - part.mean(0)) ** 2).sum() for part in (rows[split], rows[~split])) for split in splits)


def test_prices_are_added_to_squared_distances() -> None:
    rows = np.array([[0.0], [1.0], [2.0]], np.float32)
    codebook = Codebook(np.array([[0.0], [2.0]], np.float32), np.array([0.0, 1.5], np.float32))
    # Squared distances plus prices: (0, 5.5), (1, 2.5), (4, 1.5).
    codes, slack = nearest(rows, codebook, runner_up=True)
    assert codes.tolist() == [0, 0, 1]
    np.testing.assert_allclose(slack, [5.5, 1.5, 2.5], atol=1e-5)


def test_plain_k_means_ends_where_lloyd_does() -> None:
    rows = vectors()
    codes, codebook = fitted(rows, 7, balanced=False, iterations=200)
    distances = ((rows[:, None] - codebook.codewords_KD[None]) ** 2).sum(2)
    assert codes.tolist() == distances.argmin(1).tolist()
    means = np.stack([rows[codes == code].mean(0) for code in range(7)])
    np.testing.assert_allclose(codebook.codewords_KD, means, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 80), st.integers(0, 3), st.booleans())
def test_balanced_clusters_differ_by_one_at_most(codes: int, more: int, seed: int, alike: bool) -> None:
    rows = vectors(codes + more, 2, seed=seed)
    rows = np.round(rows) if alike else rows  # many rows in the same place
    found, _ = fitted(rows, codes, balanced=True, cut=16, iterations=5)
    sizes = np.bincount(found, minlength=codes)
    assert sizes.max() - sizes.min() <= 1


def test_balanced_codewords_are_the_means_of_their_rows() -> None:
    rows = vectors()
    codes, codebook = fitted(rows, 9, balanced=True)
    np.testing.assert_allclose(codebook.codewords_KD, [rows[codes == code].mean(0) for code in range(9)], atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_balance_costs_little_more_than_the_best_there_is(seed: int) -> None:
    rows = vectors(12, 2, seed=seed)
    tries = []
    for start in range(5):
        shards = LocalShards(rows)
        codebook = fit_codebook(shards, 2, iterations=25, seed=start, balanced=True)
        tries.append(inertia(rows, np.concatenate(shards.every("finish_level", codebook.codewords_KD)), codebook.codewords_KD))
    assert min(tries) <= 1.05 * best_balanced_split(rows)


def test_balance_costs_little_more_than_plain_clusters() -> None:
    rows = vectors(4000, 8)
    plain, free = fitted(rows, 64, balanced=False, cut=1000)
    even, priced = fitted(rows, 64, balanced=True, cut=1000)
    assert inertia(rows, even, priced.codewords_KD) <= 1.05 * inertia(rows, plain, free.codewords_KD)


def test_the_cut_into_shards_makes_no_difference_to_plain_clusters() -> None:
    rows = vectors()
    codes, codebook = fitted(rows, 8, balanced=False)
    for cut in (300, 7):
        others, other = fitted(rows, 8, balanced=False, cut=cut)
        assert others.tolist() == codes.tolist()
        np.testing.assert_allclose(other.codewords_KD, codebook.codewords_KD, atol=1e-5)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_number_of_threads_makes_no_difference(balanced: bool) -> None:
    rows = vectors(3000, 8)
    codes, codebook = fitted(rows, 64, balanced=balanced, cut=256, iterations=8)
    others, other = fitted(rows, 64, balanced=balanced, cut=256, iterations=8, threads=3)
    assert others.tolist() == codes.tolist()
    np.testing.assert_array_equal(other.codewords_KD, codebook.codewords_KD)


def test_rows_that_are_all_alike_are_dealt_out_in_few_passes() -> None:
    rows = np.concatenate([np.zeros((600, 4), np.float32), vectors(600)])
    shards = Counting(rows)
    fit_codebook(shards, 64, iterations=3, seed=0, balanced=True)
    assert shards.calls["offers"] <= 64 / 16 + 2


@pytest.mark.parametrize("most", [1, 100])
def test_crowded_clusters_a_few_at_a_time_end_even_at_about_the_same_cost(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = vectors(2000, 8)
    together, codebook = fitted(rows, 32, balanced=True)
    monkeypatch.setattr(kmeans, "MOST_ROWS", most)
    codes, other = fitted(rows, 32, balanced=True)
    assert np.ptp(np.bincount(codes)) <= 1
    assert inertia(rows, codes, other.codewords_KD) <= 1.03 * inertia(rows, together, codebook.codewords_KD)


def test_earlier_codes_are_where_clusters_start() -> None:
    corners = np.array([[0, 0], [9, 0], [0, 9], [9, 9]], np.float32)
    rows = np.repeat(corners, 5, axis=0) + vectors(20, 2) * 0.1
    before = np.repeat([2, 0, 3, 1], 5).astype(np.int32)
    before[[4, 19]] = -1  # two items that the earlier fit did not have
    shards = LocalShards(rows[:, ::-1].copy())  # and axes that changed places since
    codebook = fit_codebook(shards, 4, iterations=10, seed=0, balanced=False, before_N=before)
    codes = np.concatenate(shards.every("finish_level", codebook.codewords_KD))
    assert codes.tolist() == np.repeat([2, 0, 3, 1], 5).tolist()


def test_a_codeword_that_nobody_took_takes_a_share_of_a_crowded_one() -> None:
    rows = np.concatenate([vectors(200, 2), vectors(1, 2) + 50])
    shards = LocalShards(rows)
    before = np.zeros(201, np.int32)
    before[200] = 1
    codebook = fit_codebook(shards, 8, iterations=20, seed=0, balanced=False, before_N=before)
    codes = np.concatenate(shards.every("finish_level", codebook.codewords_KD))
    assert len(set(codes.tolist())) == 8


def test_the_fullest_clusters_take_what_does_not_divide() -> None:
    assert capacities(np.array([1, 6, 4])).tolist() == [3, 4, 4]
    assert capacities(np.array([0, 0, 6])).tolist() == [2, 2, 2]


def test_the_first_rows_of_each_group_are_kept() -> None:
    assert first_of_each(np.array([0, 0, 0, 2, 2, 3]), np.array([2, 9, 0, 1])).tolist() == [True, True, False, False, False, True]
