"""The calculator behind `rankgr plan`: sums that can be done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra.slate_codec import Slate, encode_slate
from serving.sizing import Load, plan_of, slate_bytes

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
