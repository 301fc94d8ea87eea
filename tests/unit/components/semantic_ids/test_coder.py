"""What gives an item its SID goes into files and comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.semantic_ids.coder import FILES, Coder, new_quantizer, read_quantizer
from components.semantic_ids.encoder import FeatureEncoder, TextEncoder
from components.semantic_ids.quantize import ResidualKMeans
from components.semantic_ids.rq_vae import RQVAE
from components.semantic_ids.shards import LocalShards
from infra.sections import RqVaeConfig, SemanticIdConfig
from tests.unit.components.semantic_ids.catalogues import items

TEXTS = [f"kind{number % 4} colour{number % 3} size{number % 5}" for number in range(60)]
QUANTIZERS = ["rq_kmeans", "balanced_rq_kmeans", "rq_vae"]


def settings(quantizer: str) -> SemanticIdConfig:
    network = RqVaeConfig(latent_dim=3, hidden_dims=[6], epochs=2, batch=20)
    return SemanticIdConfig(quantizer=quantizer, codes=4, levels=2, iterations=3, text_dim=5, rq_vae=network)


def fitted(quantizer: str) -> Coder:
    config = settings(quantizer)
    encoder = FeatureEncoder(config, TextEncoder.fit(TEXTS, config, seed=0), 0, signal=None)
    coder = Coder(encoder, new_quantizer(config, seed=0))
    coder.quantizer.fit(LocalShards(encoder.transform(items(TEXTS))))
    return coder


def test_settings_name_the_quantizer() -> None:
    plain, balanced, network = (new_quantizer(settings(name), seed=7) for name in QUANTIZERS)
    assert isinstance(plain, ResidualKMeans) and isinstance(balanced, ResidualKMeans) and isinstance(network, RQVAE)
    assert (plain.balanced, balanced.balanced) == (False, True)
    assert {(made.levels, made.codes, made.iterations, made.seed) for made in (plain, balanced, network)} == {(2, 4, 3, 7)}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_is_written_encodes_as_before(tmp_path: Path, quantizer: str) -> None:
    coder = fitted(quantizer)
    coder.write(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    vectors, codes = coder.encode(items(TEXTS))
    restored = Coder.read(str(tmp_path), settings(quantizer))
    again_vectors, again = restored.encode(items(TEXTS))
    np.testing.assert_array_equal(again_vectors, vectors)
    np.testing.assert_array_equal(again, codes)
    assert read_quantizer(str(tmp_path), settings(quantizer)).tensors().keys() == coder.quantizer.tensors().keys()


@pytest.mark.parametrize("quantizer", ["rq_kmeans", "rq_vae"])
def test_items_are_encoded_by_features_and_quantizer(quantizer: str) -> None:
    coder = fitted(quantizer)
    vectors, codes = coder.encode(items(TEXTS))
    features = coder.encoder.transform(items(TEXTS))
    np.testing.assert_array_equal(vectors, coder.quantizer.project(features))
    np.testing.assert_array_equal(codes, coder.quantizer.encode(features))


def test_new_items_without_a_feature_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    coder = fitted("rq_kmeans")
    coder.encode(items(["kind1", "unheard"]))
    assert "such_as=['item-1']" in capsys.readouterr().err
    coder.encode(items(["kind1"]))
    assert "such_as" not in capsys.readouterr().err
