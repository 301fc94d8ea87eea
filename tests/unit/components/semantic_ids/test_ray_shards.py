"""Shards on Ray actors give what shards in one process give, from files that are read anew in each pass or kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.semantic_ids import ray_shards as module
from components.semantic_ids.quantize import ResidualKMeans
from components.semantic_ids.ray_shards import ray_shards, write_blocks
from components.semantic_ids.shards import LocalShards
from infra.errors import DataError, StorageError

VECTORS = np.random.default_rng(0).normal(size=(230, 5)).astype(np.float32)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return write_blocks((VECTORS[start : start + 50] for start in range(0, 230, 50)), str(tmp_path))


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("balanced", [False, True])
def test_actors_find_the_codes_of_one_process(ray_cluster: None, files: list[str], balanced: bool, kept: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", kept)
    alone = ResidualKMeans(2, 8, 10, balanced=balanced)
    codes = alone.fit(LocalShards(VECTORS))
    shared = ResidualKMeans(2, 8, 10, balanced=balanced)
    with ray_shards(files, workers=2) as shards:
        assert shards.sizes.tolist() == [50, 50, 50, 50, 30]
        assert shared.fit(shards).tolist() == codes.tolist()
    np.testing.assert_allclose(shared.tensors()["codebooks"], alone.tensors()["codebooks"], atol=1e-5)


def test_more_workers_than_files_are_not_started(ray_cluster: None, files: list[str]) -> None:
    with ray_shards(files[:1], workers=2) as shards:
        assert [len(rows) for rows in shards.every("residual")] == [50]


def test_one_shard_is_asked_alone(ray_cluster: None, files: list[str]) -> None:
    with ray_shards(files, workers=2) as shards:
        for shard in range(5):
            np.testing.assert_array_equal(shards.one(shard, "pick", np.array([7])), VECTORS[[50 * shard + 7]])


def test_files_of_other_widths_are_refused(ray_cluster: None, files: list[str], tmp_path: Path) -> None:
    other = write_blocks([VECTORS[:, :3]], str(tmp_path / "narrow"))
    with pytest.raises(DataError, match="different widths"), ray_shards([*files, *other], workers=2):
        pass


def test_an_error_of_ours_in_an_actor_arrives_as_it_is(ray_cluster: None, files: list[str]) -> None:
    with ray_shards(files, workers=1) as shards:
        Path(files[0]).unlink()
        with pytest.raises(StorageError, match="does not exist") as caught:
            shards.every("residual")
    assert "block-00000" in caught.value.where
