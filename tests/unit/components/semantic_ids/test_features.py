"""Text, given embeddings and co-occurrence become one matrix; each part by hand on a few items."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from components.semantic_ids.features import cosine_features, item_features, pmi_features, text_features
from infra.config import SemanticIdConfig
from infra.errors import DataError, ServiceError

TEXTS = ["star wars", "star trek", "love story", ""]


def features(
    *,
    texts: list[str] | None = None,
    embeddings: list[list[float] | None] | None = None,
    timelines: list[list[int]] | None = None,
    **settings: Any,
) -> np.ndarray:
    n_items = len(texts or embeddings or [0] * 4)
    config = SemanticIdConfig(**{"text_dim": 2, "collaborative_dim": 2, **settings})
    return item_features(
        texts or [""] * n_items,
        embeddings or [None] * n_items,
        [np.asarray(items) for items in timelines or []],
        config,
        item_ids=[f"item-{number}" for number in range(n_items)],
        seed=0,
    )


def test_each_part_has_the_length_of_its_weight() -> None:
    matrix = features(
        texts=TEXTS,
        embeddings=[[3, 4], [0, 1], None, [5, 0]],
        timelines=[[0, 1, 2, 3], [1, 0]],
        text_weight=0.5,
        embedding_weight=2,
        collaborative_weight=3,
    )
    assert matrix.shape == (4, 6)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(matrix[:, :2], axis=1), [0.5, 0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(matrix[:, 2:4], [[1.2, 1.6], [0, 2], [0, 0], [2, 0]], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(matrix[:, 4:], axis=1), [3, 3, 3, 3], atol=1e-5)


def test_a_part_of_weight_0_is_left_out() -> None:
    assert features(texts=TEXTS, embeddings=[[1, 2, 3]] * 4, text_weight=0).shape == (4, 3)


def test_an_item_without_any_feature_has_a_zero_row() -> None:
    matrix = features(texts=TEXTS, timelines=[[0, 1], [1, 2]])
    np.testing.assert_allclose(matrix[3], 0, atol=1e-6)
    assert (np.linalg.norm(matrix[:3], axis=1) > 0.5).all()


def test_no_feature_at_all_is_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match="no item has a feature") as caught:
        features(texts=["", ""])
    assert "collaborative_weight" in caught.value.mend


def test_texts_that_share_a_word_are_nearer_than_those_that_do_not() -> None:
    vectors = text_features(TEXTS, SemanticIdConfig(text_dim=3), seed=0)
    assert vectors[0] @ vectors[1] > 0.1
    assert abs(vectors[0] @ vectors[2]) < 1e-6


def test_texts_that_are_all_the_same_are_no_error() -> None:
    vectors = text_features(["same words"] * 4, SemanticIdConfig(text_dim=2), seed=0)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(vectors, vectors[:1].repeat(4, axis=0), atol=1e-6)


def test_texts_without_a_word_are_an_error() -> None:
    with pytest.raises(DataError, match="hold no words"):
        features(texts=["!", "?"])


def test_sentence_transformers_that_are_not_installed_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ServiceError, match="sentence-transformers is not installed") as caught:
        features(texts=TEXTS, text_encoder="some/encoder")
    assert caught.value.mend == "pip install -c constraints.txt -e '.[text]'"
    assert "some/encoder" in caught.value.where


def test_a_nan_embedding_names_its_items() -> None:
    with pytest.raises(DataError, match="2 item embeddings hold NaN or infinity: item-1, item-3"):
        features(embeddings=[[1, 2], [float("nan"), 0], None, [0, float("inf")]])


def test_embeddings_of_different_widths_are_an_error() -> None:
    with pytest.raises(DataError, match=r"different widths: \[2, 3\]"):
        features(embeddings=[[1, 2], [1, 2, 3]])


def ppmi(timelines: list[list[int]], n_items: int, window: int) -> np.ndarray:
    """What the collaborative vectors factorise, in plain loops."""
    counts = np.zeros((n_items, n_items))
    for items in timelines:
        for i, first in enumerate(items):
            for j in range(i + 1, min(i + window + 1, len(items))):
                counts[first, items[j]] += 1 / (j - i)
                counts[items[j], first] += 1 / (j - i)
    marginal = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(counts * counts.sum() / np.outer(marginal, marginal))
    values = np.where(counts > 0, np.maximum(values, 0), 0)
    np.fill_diagonal(values, 0)
    return values


def test_ppmi_of_one_timeline_by_hand() -> None:
    # 0-1 and 1-2 count 1, 0-2 counts 1/2; marginals 1.5, 2, 1.5 of 5.
    values = ppmi([[0, 1, 2]], 3, window=2)
    np.testing.assert_allclose(values[0, 1], np.log(1 * 5 / (1.5 * 2)))
    np.testing.assert_allclose(values[0, 2], np.log(0.5 * 5 / (1.5 * 1.5)))


@pytest.mark.parametrize("window", [1, 2, 10])
def test_collaborative_vectors_span_the_ppmi_matrix(window: int) -> None:
    timelines = [[0, 1, 2], [0, 1], [3, 4, 3, 0], [2, 4]]
    vectors = pmi_features([np.asarray(t) for t in timelines], 6, dim=5, window=window, seed=0)
    values = ppmi(timelines, 6, window)
    assert vectors.shape == (6, 5)
    # U S of the SVD has the same inner products as the rows of the matrix.
    np.testing.assert_allclose(vectors @ vectors.T, values @ values.T, atol=1e-4)


def test_items_that_only_meet_themselves_have_no_signal() -> None:
    np.testing.assert_array_equal(pmi_features([np.array([0, 0])], 3, dim=2, window=2, seed=0), np.zeros((3, 2)))


def test_cosine_vectors_span_neighbours_and_visits() -> None:
    timelines = [[0, 1, 2], [0, 1], [3, 4, 3, 0], [2, 4], [5, 1], [5], [0, 5]]
    vectors = cosine_features([np.asarray(t) for t in timelines], 6, dim=5, window=10, seed=0)
    counts = np.zeros((6, 6))
    visits = np.zeros((6, len(timelines)))
    for user, items in enumerate(timelines):
        for i, first in enumerate(items):
            visits[first, user] = 1
            for j in range(len(items)):
                if items[j] != first:
                    counts[first, items[j]] += 1 / abs(i - j)
    events = np.bincount(np.concatenate(timelines), minlength=6) + 5
    neighbours = counts / np.sqrt(np.outer(events, events))
    shares = visits / np.sqrt(np.outer(visits.sum(1), visits.sum(0)))
    for half, matrix in ((vectors[:, :5], neighbours), (vectors[:, 5:], shares)):
        left, values, _ = np.linalg.svd(matrix)
        expected = left[:, :5] * values[:5]
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(half @ half.T, expected @ expected.T, atol=1e-4)


@pytest.mark.parametrize("collaborative", ["pmi", "cosine"])
def test_an_item_that_nobody_had_has_no_collaborative_signal(collaborative: str) -> None:
    found = features(texts=["", "", "", ""], timelines=[[0, 1, 2], [1, 0]], collaborative=collaborative)
    np.testing.assert_array_equal(np.abs(found).sum(axis=1) > 0, [True, True, True, False])


@pytest.mark.parametrize("build", [pmi_features, cosine_features])
def test_no_timeline_gives_zero_vectors(build: Any) -> None:
    assert not build([], 3, dim=2, window=2, seed=0).any()


def test_no_pair_gives_zero_vectors() -> None:
    np.testing.assert_array_equal(pmi_features([], 3, dim=2, window=2, seed=0), np.zeros((3, 2)))


def test_equal_seeds_give_equal_features() -> None:
    timelines = [[0, 1, 2, 3], [3, 1], [2, 0]]
    np.testing.assert_array_equal(features(texts=TEXTS, timelines=timelines), features(texts=TEXTS, timelines=timelines))
