"""Figures of a SID table by hand."""

from __future__ import annotations

import numpy as np
import pytest

from components.semantic_ids.stats import sid_statistics

CODEBOOKS = np.array([[[0.0], [10.0], [20.0], [30.0]], [[0.0], [1.0], [2.0], [3.0]]], dtype=np.float32)


def test_statistics_of_four_items() -> None:
    encoded = np.array([[0, 1], [0, 1], [1, 2], [3, 0]], dtype=np.int32)
    final = np.array([[0, 1], [0, 2], [1, 2], [3, 0]], dtype=np.int32)
    vectors = np.array([[1], [1], [12], [30]], dtype=np.float32)
    figures = sid_statistics(vectors, encoded, final, CODEBOOKS)
    # Reconstructions 1, 2, 12, 30: an error of 1. Mean 11, spread 100 + 100 + 1 + 361.
    assert figures["reconstruction_error"] == pytest.approx(1 / 562)
    assert figures["items"] == 4
    assert figures["collision_rate_before"] == 0.5
    assert figures["collision_rate"] == 0.0
    assert figures["largest_bucket"] == 1
    assert figures["moved"] == 1
    first, second = figures["levels"]
    # Shares 1/2, 1/4, 1/4 have an entropy of 1.5 bits.
    assert first == {"utilisation": 0.75, "perplexity": pytest.approx(2**1.5), "counts": [2, 1, 1, 0]}
    assert second == {"utilisation": 0.75, "perplexity": pytest.approx(2**1.5), "counts": [2, 1, 1, 0]}


def test_shared_codes_count_every_item_in_them() -> None:
    codes = np.array([[0, 0]] * 3 + [[1, 1]], dtype=np.int32)
    figures = sid_statistics(np.zeros((4, 1), dtype=np.float32), codes, codes, CODEBOOKS)
    assert (figures["collision_rate"], figures["largest_bucket"], figures["moved"]) == (0.75, 3, 0)
    assert figures["levels"][0]["perplexity"] == pytest.approx(2 ** (0.75 * np.log2(4 / 3) + 0.25 * 2))
