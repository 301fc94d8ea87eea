"""Blocks encoded by actors are those encoded here."""

from __future__ import annotations

import numpy as np
import pytest

from components.semantic_ids.encoder import FeatureEncoder, TextEncoder
from components.semantic_ids.ray_encoding import content_on_ray
from infra.errors import ConfigError, DataError
from infra.sections import SemanticIdConfig
from tests.unit.components.semantic_ids.catalogues import items

TEXTS = [f"word{number % 7} word{number % 5}" for number in range(40)]
ALL = items(TEXTS, [[number, 1.0] if number % 3 else None for number in range(40)])
CONFIG = SemanticIdConfig(text_dim=4)


@pytest.fixture(scope="module")
def encoder() -> FeatureEncoder:
    return FeatureEncoder(CONFIG, TextEncoder.fit(TEXTS, CONFIG, seed=0), 2, signal=None)


def test_actors_give_the_blocks_of_one_process_in_their_order(ray_cluster: str, encoder: FeatureEncoder) -> None:
    blocks = ALL.combine_chunks().to_batches(3)
    found = list(content_on_ray(encoder, blocks, workers=2))
    assert [len(block) for block in found] == [3] * 13 + [1]
    np.testing.assert_allclose(np.concatenate(found), encoder.content(ALL), atol=1e-7)


def test_few_blocks_are_under_way_at_a_time(ray_cluster: str, encoder: FeatureEncoder) -> None:
    asked = iter(ALL.combine_chunks().to_batches(1))
    found = content_on_ray(encoder, asked, workers=2)
    next(found)
    assert len(list(asked)) == 40 - 4
    found.close()


def test_an_error_of_ours_arrives_as_it_is(ray_cluster: str, encoder: FeatureEncoder) -> None:
    bad = items(["", ""], [[1, 2], [1, float("nan")]], ["a", "b"]).to_batches()
    with pytest.raises(DataError, match="NaN or infinity: b"):
        list(content_on_ray(encoder, bad, workers=1))


def test_more_workers_than_cpus_are_refused_rather_than_waited_for(ray_cluster: str, encoder: FeatureEncoder) -> None:
    with pytest.raises(ConfigError, match="64 workers need as many CPUs, the cluster has 4"):
        list(content_on_ray(encoder, ALL.to_batches(), workers=64))
