"""What a plan says about passes and memory, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from components.semantic_ids.plan import plan_of
from infra.sections import RqVaeConfig, SemanticIdConfig

SETTINGS = SemanticIdConfig(levels=3, codes=1024, iterations=10, workers=4)


def test_ten_million_items_are_read_once_a_pass_a_shard_at_a_time() -> None:
    plan = plan_of(10_000_000, 64, SETTINGS)
    assert plan.passes == 3 * 12
    assert plan.shard_rows == 8192
    assert plan.read_bytes == 36 * 10_000_000 * 64 * 4
    assert plan.tera_operations == pytest.approx(36 * 2 * 10_000_000 * 1024 * 64 / 1e12)
    # Two copies of a shard, a block of distances, codes of its share, three tables of codewords; all its share would be 610 MiB.
    assert plan.worker_bytes == 4 * (2 * 8192 * 64 + 2_500_000 * 5 + 512 * 1024 + 3 * 1024 * 64)
    assert plan.worker_bytes < 60 * 2**20


def test_the_driver_holds_blocks_codes_and_ids_but_no_features() -> None:
    small, large = (plan_of(items, 64, SETTINGS).driver_bytes for items in (10_000_000, 20_000_000))
    an_item = 40 + 12 * 3
    assert large - small == 10_000_000 * an_item
    blocks, codebooks, sample = 8 * 8192 * 64, 1024 * 64 * (3 + 2 * 4), 8 * 1024 * 64
    assert small - 10_000_000 * an_item == 64 * 2**20 + 4 * (blocks + codebooks + sample) + 400 * 2**19


def test_features_lie_in_files_with_and_without_the_signal_and_for_the_workers() -> None:
    features = 10_000_000 * 64 * 4
    assert plan_of(10_000_000, 64, SETTINGS).file_bytes == 3 * features
    assert plan_of(10_000_000, 64, SETTINGS.model_copy(update={"workers": 0})).file_bytes == 2 * features
    alone = plan_of(10_000_000, 64, SETTINGS.model_copy(update={"workers": 0, "collaborative_weight": 0}))
    assert (alone.file_bytes, alone.signal_bytes) == (features, 0)


@pytest.mark.parametrize(("kind", "matrices"), [("pmi", 5), ("cosine", 6), ("adapter", 6)])
def test_a_collaborative_signal_is_counted(kind: str, matrices: int) -> None:
    settings = SETTINGS.model_copy(update={"collaborative": kind, "collaborative_dim": 32})
    assert plan_of(1_000_000, 64, settings).signal_bytes == matrices * 1_000_000 * 32 * 4


def test_what_fits_is_kept_and_read_once() -> None:
    plan = plan_of(100_000, 64, SETTINGS)
    assert plan.read_bytes == 0
    assert next(name for name, _ in plan.rows()) == "passes over the items"


def test_memory_of_a_worker_hardly_grows_with_the_items() -> None:
    small, large = (plan_of(items, 64, SETTINGS).worker_bytes for items in (10_000_000, 20_000_000))
    assert large - small == 4 * 2_500_000 * 5  # codes alone


AUTOENCODER = SETTINGS.model_copy(update={"quantizer": "rq_vae", "rq_vae": RqVaeConfig(hidden_dims=[128], epochs=20, batch=4096)})
WEIGHTS, CODEWORDS = 2 * (64 * 128 + 128 * 32), 3 * 1024 * 32


def test_an_autoencoder_reads_the_items_at_most_twice_an_epoch() -> None:
    plan = plan_of(10_000_000, 64, AUTOENCODER)
    assert plan.passes == 2 * 20 + 3
    assert plan.read_bytes == 43 * 10_000_000 * 64 * 4
    a_row = 20 * (6 * WEIGHTS + 2 * CODEWORDS) + WEIGHTS + 2 * CODEWORDS
    assert plan.tera_operations == pytest.approx(10_000_000 * a_row / 1e12)


def test_a_worker_of_an_autoencoder_has_its_share_of_eight_shards_and_of_a_minibatch() -> None:
    small, large = (plan_of(items, 64, AUTOENCODER).worker_bytes for items in (10_000_000, 20_000_000))
    assert plan_of(10_000_000, 64, AUTOENCODER).shard_rows == 2 * 8192
    open_shards, activations, distances = 3 * 8192 * 64, 2 * 8192 * 128, 1024 * 2 * 1024
    assert small == large == 4 * (open_shards + activations + distances + 3 * (WEIGHTS + CODEWORDS))


def test_the_latents_of_an_autoencoder_lie_in_a_file() -> None:
    more = plan_of(10_000_000, 64, AUTOENCODER).file_bytes - plan_of(10_000_000, 64, SETTINGS).file_bytes
    assert more == 10_000_000 * 32 * 4
