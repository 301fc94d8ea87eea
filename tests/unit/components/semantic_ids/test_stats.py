"""Figures of a SID table by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from components.semantic_ids import stats
from components.semantic_ids.quantize import ResidualKMeans
from components.semantic_ids.shards import Codebook
from components.semantic_ids.stats import bucket_sizes, entropy, gini, prefix_hit_rate, prefix_sizes, sid_statistics

CODEBOOKS = (
    Codebook.free(np.array([[0.0], [10.0], [20.0], [30.0]], dtype=np.float32)),
    Codebook.free(np.array([[0.0], [1.0], [2.0], [3.0]], dtype=np.float32)),
)
QUANTIZER = ResidualKMeans.frozen(CODEBOOKS)
TABLES = hnp.arrays(np.int32, st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=st.integers(0, 5))
COUNTS = hnp.arrays(np.int64, st.integers(1, 30), elements=st.integers(0, 1000)).filter(lambda counts: counts.sum() > 0)


def test_statistics_of_four_items() -> None:
    encoded = np.array([[0, 1], [0, 1], [1, 2], [3, 0]], dtype=np.int32)
    final = np.array([[0, 1], [0, 2], [1, 2], [3, 0]], dtype=np.int32)
    vectors = np.array([[1], [1], [12], [30]], dtype=np.float32)
    figures = sid_statistics(vectors, encoded, final, QUANTIZER)
    # Reconstructions 1, 2, 12, 30: an error of 1. Mean 11, spread 100 + 100 + 1 + 361.
    assert figures["reconstruction_error"] == pytest.approx(1 / 562)
    assert (figures["items"], figures["sids"], figures["largest_bucket"], figures["moved"], figures["duplicates"]) == (4, 4, 1, 1, 2)
    assert figures["collision_rate_before"] == 0.5
    assert figures["collision_rate"] == 0.0
    # Shares 1/2, 1/4, 1/4 have an entropy of 1.5 bits. Of 2, 1, 1, 0 the 16 differences add up to 12: a mean of 3/4, over twice the
    # mean of 1 a Gini coefficient of 3/8.
    level: dict[str, Any] = {
        "utilisation": 0.75,
        "utilisation_before": 0.75,
        "perplexity": pytest.approx(2**1.5),
        "entropy": pytest.approx(1.5),
        "gini": pytest.approx(3 / 8),
        "size_min": 0,
        "size_max": 2,
        "counts": [2, 1, 1, 0],
    }
    # Four different SIDs are 2 bits: the second codeword adds half a bit to the first's 1.5.
    assert figures["levels"] == [
        level | {"conditional_entropy": pytest.approx(1.5)},
        level | {"conditional_entropy": pytest.approx(0.5)},
    ]


def test_shared_codes_count_every_item_in_them() -> None:
    codes = np.array([[0, 0]] * 3 + [[1, 1]], dtype=np.int32)
    figures = sid_statistics(np.zeros((4, 1), dtype=np.float32), codes, codes, QUANTIZER)
    assert (figures["collision_rate"], figures["largest_bucket"], figures["moved"], figures["sids"]) == (0.75, 3, 0, 2)
    assert figures["levels"][0]["perplexity"] == pytest.approx(2 ** (0.75 * np.log2(4 / 3) + 0.25 * 2))
    assert figures["levels"][1]["conditional_entropy"] == 0.0


def test_a_codeword_that_follows_from_the_prefix_adds_nothing_and_a_free_one_all_its_bits() -> None:
    vectors = np.zeros((4, 1), dtype=np.float32)
    bound = np.array([[0, 3], [0, 3], [1, 2], [1, 2]], dtype=np.int32)
    free = np.array([[0, 2], [0, 3], [1, 2], [1, 3]], dtype=np.int32)
    for codes, bits in ((bound, 0.0), (free, 1.0)):
        second = sid_statistics(vectors, codes, codes, QUANTIZER)["levels"][1]
        assert (second["entropy"], second["conditional_entropy"]) == (1.0, bits)


def test_duplicates_are_counted_across_blocks_and_zeros_have_no_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "ROWS", 2)
    vectors = np.array([[1, 0], [2, 0], [1, -0.0], [1, 1e-7], [1, 0], [3, 3]], dtype=np.float32)
    codes = np.zeros((6, 2), dtype=np.int32)
    books = [Codebook.free(np.ones((4, 2), dtype=np.float32)), Codebook.free(np.zeros((4, 2), dtype=np.float32))]
    figures = sid_statistics(vectors, codes, codes, ResidualKMeans.frozen(books))
    assert figures["duplicates"] == 3
    # All are reconstructed as (1, 1); the means are 1.5 and (3 + 1e-7) / 6.
    assert figures["reconstruction_error"] == pytest.approx((1 + 2 + 1 + 1 + 1 + 8) / (4 * 0.25 + 0.25 + 2.25 + 5 * 0.25 + 6.25), rel=1e-5)


@pytest.mark.parametrize(
    ("counts", "coefficient"),
    [([5, 5, 5], 0.0), ([0, 0, 0, 8], 3 / 4), ([1, 3], 1 / 4), ([7], 0.0), ([0, 0], 0.0)],
)
def test_gini_by_hand(counts: list[int], coefficient: float) -> None:
    # Of 1 and 3: half the mean difference, (0 + 2 + 2 + 0) / 4 / 2, over the mean of 2.
    assert gini(np.array(counts)) == pytest.approx(coefficient)


@pytest.mark.parametrize(("counts", "bits"), [([4, 4, 4, 4], 2.0), ([9, 0], 0.0), ([2, 1, 1], 1.5), ([0, 0], 0.0)])
def test_entropy_by_hand(counts: list[int], bits: float) -> None:
    assert entropy(np.array(counts)) == pytest.approx(bits)


@settings(max_examples=60, deadline=None)
@given(COUNTS)
def test_bounds_of_gini_and_entropy(counts: np.ndarray) -> None:
    assert 0 <= gini(counts) <= (len(counts) - 1) / len(counts) + 1e-9
    assert 0 <= entropy(counts) <= np.log2(len(counts)) + 1e-9
    assert gini(counts * 3) == pytest.approx(gini(counts), abs=1e-9)
    # The definition: the mean difference of two counts over twice the mean.
    assert gini(counts) == pytest.approx(np.abs(counts[:, None] - counts).mean() / (2 * counts.mean()), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_bits_of_the_levels_add_up_to_those_of_the_sids(codes: np.ndarray) -> None:
    books = [Codebook.free(np.zeros((6, 1), dtype=np.float32))] * codes.shape[1]
    figures = sid_statistics(np.zeros((len(codes), 1), dtype=np.float32), codes, codes, ResidualKMeans.frozen(books))
    sizes = np.array(list(Counter(map(tuple, codes.tolist())).values()))
    assert sum(level["conditional_entropy"] for level in figures["levels"]) == pytest.approx(entropy(sizes), abs=1e-9)
    assert all(-1e-9 <= level["conditional_entropy"] <= level["entropy"] + 1e-9 for level in figures["levels"])
    assert (figures["sids"], figures["largest_bucket"]) == (len(sizes), sizes.max())
    assert sorted(bucket_sizes(codes)) == sorted(sizes)


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_sizes_are_those_of_the_prefixes_in_their_order(codes: np.ndarray) -> None:
    for level, sizes in enumerate(prefix_sizes(codes)):
        counts = Counter(tuple(row[: level + 1]) for row in codes.tolist())
        assert sizes.tolist() == [counts[prefix] for prefix in sorted(counts)]


def test_prefix_hit_rate_by_hand() -> None:
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0]], dtype=np.int32)
    pairs = np.array([[0, 1], [0, 2], [0, 3], [2, 2]])  # the last is left out
    figures = prefix_hit_rate(codes, pairs)
    assert figures["pairs"] == 3
    assert figures["rates"] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    # Of the 12 ordered pairs of two different items 6 share the first codeword, 2 both.
    assert figures["chance"] == [pytest.approx(6 / 12), pytest.approx(2 / 12)]
    # Ends of pairs: item 0 three times, the others once; first codewords 5/6 and 1/6, SIDs 4/6, 1/6, 1/6.
    assert figures["chance_popular"] == [pytest.approx(26 / 36), pytest.approx(18 / 36)]


def test_without_pairs_there_is_chance_alone() -> None:
    codes = np.array([[0, 0], [0, 1]], dtype=np.int32)
    for pairs in (np.empty((0, 2), np.int64), np.array([[1, 1]])):
        assert prefix_hit_rate(codes, pairs) == {"pairs": 0, "rates": [None, None], "chance": [1.0, 0.0], "chance_popular": [None, None]}


@settings(max_examples=60, deadline=None)
@given(TABLES, st.data())
def test_hit_rates_are_shares_that_fall_from_level_to_level(codes: np.ndarray, data: st.DataObject) -> None:
    pairs = data.draw(hnp.arrays(np.int64, st.tuples(st.integers(0, 20), st.just(2)), elements=st.integers(0, len(codes) - 1)))
    figures = prefix_hit_rate(codes, pairs)
    for name in ("rates", "chance", "chance_popular"):
        shares = [share for share in figures[name] if share is not None]
        assert all(0 <= share <= 1 + 1e-9 for share in shares)
        assert shares == sorted(shares, reverse=True)
