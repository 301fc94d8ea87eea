"""What a plan says about passes and memory, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from components.semantic_ids.plan import plan_of
from infra.sections import SemanticIdConfig

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
