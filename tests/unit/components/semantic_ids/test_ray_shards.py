"""Shards on Ray actors give what shards in one process give, from files that are read anew in each pass or kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.semantic_ids import ray_shards as module
from components.semantic_ids.quantize import ResidualKMeans
from components.semantic_ids.ray_shards import RayShards, ray_shards, write_blocks
from components.semantic_ids.rq_vae import RQVAE
from components.semantic_ids.shards import LocalShards
from infra.errors import ConfigError, DataError, ServiceError, StorageError
from infra.sections import RqVaeConfig

VECTORS = np.random.default_rng(0).normal(size=(230, 5)).astype(np.float32)
MANY = np.random.default_rng(1).normal(size=(5000, 16)).astype(np.float32)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return write_blocks((VECTORS[start : start + 50] for start in range(0, 230, 50)), str(tmp_path))


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("balanced", [False, True])
def test_actors_find_the_codes_of_one_process(ray_cluster: str, tmp_path: Path, balanced: bool, kept: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", kept)
    alone = ResidualKMeans(2, 128, 6, balanced=balanced)
    codes = alone.fit(LocalShards(MANY, rows=512))
    shared = ResidualKMeans(2, 128, 6, balanced=balanced)
    uris = write_blocks((MANY[start : start + 512] for start in range(0, len(MANY), 512)), str(tmp_path))
    with ray_shards(uris, workers=2) as shards:
        assert shards.sizes.tolist() == [512] * 9 + [392]
        assert shared.fit(shards).tolist() == codes.tolist()
    np.testing.assert_allclose(shared.tensors()["codebooks"], alone.tensors()["codebooks"], atol=1e-6)


def test_actors_train_the_autoencoders_of_one_process(ray_cluster: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    rows, kinds = MANY[:500], ({"codebook": "ema"}, {"codebook": "gradient", "sinkhorn": True})
    with ray_shards(write_blocks((rows[start : start + 110] for start in range(0, 500, 110)), str(tmp_path)), workers=2) as shards:
        for kind in kinds:
            settings = RqVaeConfig(latent_dim=4, hidden_dims=[16], epochs=3, batch=125).model_copy(update=kind)
            alone, shared = (RQVAE(2, 8, settings, iterations=3) for _ in range(2))
            assert shared.fit(shards).tolist() == alone.fit(LocalShards(rows, rows=110)).tolist(), kind
            for name, tensor in alone.tensors().items():
                np.testing.assert_allclose(shared.tensors()[name], tensor, atol=1e-5, err_msg=f"{kind} {name}")


def test_an_actor_that_died_is_told_of(ray_cluster: str, files: list[str]) -> None:
    with ray_shards(files, workers=2) as shards:
        kill_one(shards)
        with pytest.raises(ServiceError, match="worker died") as caught:
            RQVAE(2, 8, RqVaeConfig(epochs=1)).fit(shards)
    assert caught.value.where == "semantic_ids.workers"


def kill_one(shards: RayShards) -> None:
    import ray

    ray.kill(shards._actors[1])


def test_more_workers_than_files_are_not_started(ray_cluster: str, files: list[str]) -> None:
    with ray_shards(files[:1], workers=2) as shards:
        assert [len(rows) for rows in shards.every("residual")] == [50]


def test_one_shard_is_asked_alone(ray_cluster: str, files: list[str]) -> None:
    with ray_shards(files, workers=2) as shards:
        for shard in range(5):
            np.testing.assert_array_equal(shards.one(shard, "pick", np.array([7])), VECTORS[[50 * shard + 7]])


def test_files_of_other_widths_are_refused(ray_cluster: str, files: list[str], tmp_path: Path) -> None:
    other = write_blocks([VECTORS[:, :3]], str(tmp_path / "narrow"))
    with pytest.raises(DataError, match="different widths"), ray_shards([*files, *other], workers=2):
        pass


def test_an_error_of_ours_in_an_actor_arrives_as_it_is(ray_cluster: str, files: list[str]) -> None:
    with ray_shards(files, workers=1) as shards:
        Path(files[0]).unlink()
        with pytest.raises(StorageError, match="does not exist") as caught:
            shards.every("residual")
    assert "block-00000" in caught.value.where


def test_more_workers_than_cpus_are_refused_rather_than_waited_for(ray_cluster: str, files: list[str]) -> None:
    with pytest.raises(ConfigError, match="64 workers need as many CPUs, the cluster has 4"), ray_shards(files, workers=64):
        pass
