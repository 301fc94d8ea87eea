"""Text, given embeddings and co-occurrence become one matrix; each part by hand on a few items."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from components.semantic_ids import blocks
from components.semantic_ids import features as module
from components.semantic_ids.collaborative import pmi_features, unit
from components.semantic_ids.encoder import FeatureEncoder, TextEncoder
from components.semantic_ids.features import ItemFeatures, item_features
from infra.errors import DataError, ServiceError
from infra.sections import SemanticIdConfig
from tests.unit.components.semantic_ids.catalogues import items, written

TEXTS = ["star wars", "star trek", "love story", ""]


def built(
    *,
    texts: list[str] | None = None,
    embeddings: list[list[float] | None] | None = None,
    timelines: list[list[int]] | None = None,
    **settings: Any,
) -> ItemFeatures:
    n_items = len(texts or embeddings or [0] * 4)
    config = SemanticIdConfig(**{"text_dim": 2, "collaborative_dim": 2, **settings})
    with tempfile.TemporaryDirectory() as folder:
        catalogue = written(items(texts or [""] * n_items, embeddings), folder)
        return item_features(catalogue, [np.asarray(timeline) for timeline in timelines or []], config, new=in_memory, seed=0)


def in_memory(rows: int, width: int) -> np.ndarray:
    return np.empty((rows, width), np.float32)


def features(**arguments: Any) -> np.ndarray:
    return built(**arguments).features_ND


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
    vectors = TextEncoder.fit(TEXTS, SemanticIdConfig(text_dim=3), seed=0).encode(TEXTS)
    assert vectors[0] @ vectors[1] > 0.1
    assert abs(vectors[0] @ vectors[2]) < 1e-6


def test_texts_that_are_all_the_same_are_no_error() -> None:
    vectors = TextEncoder.fit(["same words"] * 4, SemanticIdConfig(text_dim=2), seed=0).encode(["same words"] * 4)
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


@pytest.mark.parametrize("collaborative", ["pmi", "cosine", "adapter"])
def test_an_item_that_nobody_had_has_no_collaborative_signal(collaborative: str) -> None:
    found = features(texts=["", "", "", ""], timelines=[[0, 1, 2], [1, 0]], collaborative=collaborative)
    np.testing.assert_array_equal(np.abs(found).sum(axis=1) > 0, [True, True, True, False])


def test_equal_seeds_give_equal_features() -> None:
    timelines = [[0, 1, 2, 3], [3, 1], [2, 0]]
    np.testing.assert_array_equal(features(texts=TEXTS, timelines=timelines), features(texts=TEXTS, timelines=timelines))


EMBEDDINGS: list[list[float] | None] = [[3, 4], [0, 1], None, [5, 0]]
TIMELINES = [[0, 1, 2], [1, 0]]
NEW = items(["trek story", "", "unheard"], [[1.0, 1.0], None, None])


def everything(collaborative: str) -> ItemFeatures:
    return built(texts=TEXTS, embeddings=EMBEDDINGS, timelines=TIMELINES, collaborative=collaborative)


def restored(encoder: FeatureEncoder) -> FeatureEncoder:
    """Through safetensors and JSON."""
    return FeatureEncoder.restore(encoder.config, load(save(encoder.tensors())), json.loads(json.dumps(encoder.words())))


def test_known_texts_are_encoded_as_they_were_fitted() -> None:
    found = built(texts=TEXTS)
    np.testing.assert_array_equal(found.encoder.transform(items(TEXTS)), found.features_ND)


def test_known_content_is_encoded_as_it_was_fitted_beside_a_signal() -> None:
    found = everything("cosine")
    content = found.encoder.transform(items(TEXTS, EMBEDDINGS))[:, :4]
    np.testing.assert_array_equal(content, found.features_ND[:, :4])


@pytest.mark.parametrize("collaborative", ["pmi", "cosine", "adapter"])
def test_new_items_have_features_of_the_same_width(collaborative: str) -> None:
    found = everything(collaborative)
    assert found.encoder.transform(NEW).shape == (3, found.features_ND.shape[1])


@pytest.mark.parametrize("collaborative", ["pmi", "cosine", "adapter"])
def test_a_restored_encoder_gives_the_same_features(collaborative: str) -> None:
    encoder = everything(collaborative).encoder
    np.testing.assert_array_equal(restored(encoder).transform(NEW), encoder.transform(NEW))


@pytest.mark.parametrize("collaborative", ["pmi", "cosine", "adapter"])
def test_a_new_item_without_content_has_a_zero_row(collaborative: str) -> None:
    np.testing.assert_array_equal(everything(collaborative).encoder.transform(items(["", "unheard"])), 0)


def test_words_are_in_the_order_of_columns() -> None:
    encoder = built(texts=TEXTS).encoder
    assert encoder.words() == ["love", "star", "story", "trek", "wars"]
    assert encoder.tensors()["text.components_WV"].shape[1] == 5


def test_a_new_embedding_of_another_width_names_its_item() -> None:
    encoder = built(embeddings=[[1, 2], [3, 4]]).encoder
    with pytest.raises(DataError, match="1 item embeddings are not 2 wide: b"):
        encoder.transform(items(["", ""], [[1, 2], [1, 2, 3]], ["a", "b"]))


def test_a_new_nan_embedding_names_its_item() -> None:
    encoder = built(embeddings=[[1, 2], [3, 4]]).encoder
    with pytest.raises(DataError, match="NaN or infinity: b"):
        encoder.transform(items(["", ""], [[1, 2], [1, float("nan")]], ["a", "b"]))


def test_an_embedding_dimension_without_variance_does_no_harm() -> None:
    np.testing.assert_allclose(features(embeddings=[[0, 2], [0, 5]]), [[0, 1], [0, 1]])


def test_items_without_a_feature_are_told() -> None:
    assert built(texts=[*TEXTS, ""]).without_features.tolist() == [3, 4]


def test_equal_items_have_equal_features() -> None:
    matrix = features(texts=["star wars", "star wars", "love story"])
    np.testing.assert_array_equal(matrix[0], matrix[1])


def test_there_is_nothing_to_accept_without_timelines() -> None:
    assert built(texts=TEXTS).acceptance is None


def test_a_refused_signal_leaves_content_alone() -> None:
    timelines = np.random.default_rng(0).integers(0, 4, (400, 4)).tolist()
    found = built(texts=TEXTS, timelines=timelines, min_collaborative_gain=5)
    assert found.acceptance is not None and not found.acceptance["accepted"]
    np.testing.assert_array_equal(found.features_ND, features(texts=TEXTS))


def test_an_accepted_signal_is_fitted_again_on_all_users() -> None:
    timelines = np.random.default_rng(0).integers(0, 4, (400, 4)).tolist()
    found = built(texts=TEXTS, timelines=timelines)
    signal = pmi_features([np.asarray(items) for items in timelines], 4, dim=2, window=10, seed=0)
    np.testing.assert_allclose(found.features_ND[:, 2:], unit(signal), rtol=1e-5)


def test_the_acceptance_is_json() -> None:
    found = built(texts=TEXTS, timelines=TIMELINES)
    assert json.loads(json.dumps(found.acceptance)) == found.acceptance


@pytest.mark.parametrize("collaborative", ["pmi", "cosine", "adapter"])
def test_features_do_not_depend_on_the_blocks(collaborative: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = everything(collaborative)
    monkeypatch.setattr(blocks, "ROWS", 3)
    found = everything(collaborative)
    np.testing.assert_array_equal(found.features_ND, whole.features_ND)
    assert found.acceptance == whole.acceptance


def test_workers_compute_the_features_of_one_process(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROWS", 2)
    arguments: dict[str, Any] = {"texts": TEXTS, "embeddings": EMBEDDINGS, "timelines": TIMELINES}
    np.testing.assert_allclose(features(**arguments, workers=2), features(**arguments), atol=1e-6)


def test_text_is_fitted_on_evenly_spaced_items_where_they_are_very_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TEXTS", 2)
    assert built(texts=["star", "wars", "trek", "love"]).encoder.words() == ["star", "trek"]
