"""The calculator behind `rankgr plan`: sums that can be done by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest

from components.sessions import shards, sources
from infra import storage
from infra.sections import DataConfig
from infra.slate_codec import Slate, encode_slate
from serving.sizing import SHARD_EVENTS, WRITTEN_AT_ONCE, Load, plan_of, sharding_of, slate_bytes

SMALL = Load(users=1000, items=1000, rps=10)


def test_a_small_service_has_two_ingress_replicas_and_one_of_the_model() -> None:
    plan = plan_of(SMALL)
    assert (plan.ingress_replicas, plan.model_replicas, plan.bulk_cores, plan.cores) == (2, 1, 1, 5)


def test_replicas_follow_the_reads_at_the_measured_rate() -> None:
    # 10,000 / (543 x 0.6) = 30.7; a tenth of the reads at 2.3 ms each, 0.6 of a core planned with: 3.8
    plan = plan_of(replace(SMALL, rps=10_000))
    assert (plan.ingress_replicas, plan.model_replicas) == (31, 4)


def test_a_bulk_run_gets_the_cores_that_its_hours_leave() -> None:
    # 100 million users x 2.3 ms = 230,000 core seconds, in 4 hours of 3,600: 15.97
    assert plan_of(replace(SMALL, users=100_000_000)).bulk_cores == 16


def test_the_slate_is_as_long_as_the_codec_makes_it() -> None:
    slate = Slate("u", ("0123456789",) * 100, (0.5,) * 100, "123456789abc", 1, False)
    assert slate_bytes(SMALL) == len(encode_slate(slate)) + 100


def test_the_cost_is_cores_and_memory_at_their_prices() -> None:
    plan = plan_of(SMALL)
    assert plan.cost(core=10, gb=2) == pytest.approx(10 * 6 + 2 * (plan.redis_gb + plan.service_gb))


@pytest.mark.parametrize(
    ("events", "n_shards", "worker_gb", "files"),
    [
        (1, 1, 0.35, 1),
        (2_000_000, 4, 0.56, 16),  # 4 shards, each written to 4 times
        (20_000_000, 40, 0.56, 1600),
        (100_000_000, 128, 0.68, 25_600),  # 781,250 events a shard
        (1_000_000_000, 500, 1.19, 1_000_000),
        (10_000_000_000, 5000, 1.19, 100_000_000),
    ],
)
def test_shards_follow_the_events_and_grow_before_there_are_too_many(events: int, n_shards: int, worker_gb: float, files: int) -> None:
    found = sharding_of(events, users=10**9)
    assert (found.shards, found.worker_gb, found.exchanged_files) == (n_shards, worker_gb, files)


def test_a_user_is_not_cut() -> None:
    assert sharding_of(100 * SHARD_EVENTS, users=3).shards == 3


def test_what_was_measured_with_the_benchmark_fits_the_plan() -> None:
    # MiB of the largest worker, tests/benchmarks/results/sessions.md
    for events, mib in ((2_000_000, 543), (20_000_000, 568)):
        assert sharding_of(events, users=events // 40).worker_gb == pytest.approx(mib * 2**20 / 1e9, rel=0.1)


@pytest.mark.parametrize(("log_files", "at_once"), [(1, 1000), (3, 1000), (2, 1)])
def test_the_exchange_writes_a_file_for_every_shard_each_time(
    log_files: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shards._ROWS_AT_ONCE == WRITTEN_AT_ONCE
    monkeypatch.setattr(shards, "_ROWS_AT_ONCE", at_once)
    monkeypatch.setattr(sources, "_ROWS", 200)
    events = {"user_id": [f"u{n}" for n in range(400)], "item_id": ["a"] * 400, "timestamp": [1_700_000_000_000] * 400, "level": [2] * 400}
    for number in range(log_files):
        storage.write_table(pa.table(events), str(tmp_path / "log" / f"{number}.parquet"))
    data = DataConfig(logs=str(tmp_path / "log"), shards=4)
    pieces = [{**asdict(piece), "number": number} for number, piece in enumerate(sources.pieces_of(data.logs))]
    list(shards._split_pieces(pa.Table.from_pylist(pieces), data, 3, str(tmp_path / "scratch")))
    times = log_files * (2 if at_once == 1 else 1)
    assert len(list((tmp_path / "scratch").rglob("*.parquet"))) == 4 * times
