"""Fresh slates: one flight a user and version, a queue with an end, a deadline, old slates last. A real Valkey for the claims."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from infra.activity import UserActivity
from infra.metrics import Meter
from infra.slate_store import AsyncSlateReader
from serving.flights import FreshSlates, Outcome, SlateRequest
from serving.intake import Overloaded


class Model:
    """Notes what it is asked, and answers once it may."""

    def __init__(self) -> None:
        self.asked: list[SlateRequest] = []
        self.may = asyncio.Event()

    async def compute(self, request: SlateRequest) -> Outcome:
        self.asked.append(request)
        await self.may.wait()
        if request.user_id == "broken":
            raise RuntimeError("the model broke")
        return "stored"

    @property
    def users(self) -> list[str]:
        return [request.user_id for request in self.asked]


def tell(
    url: str, story: Callable[[Model, FreshSlates, Meter], Awaitable[None]], *, max_pending: int = 4, deadline_s: float = 30.0
) -> None:
    async def run() -> None:
        async with AsyncSlateReader(url) as reader:
            model, meter = Model(), Meter()
            slates = FreshSlates(model.compute, UserActivity(reader), max_pending=max_pending, deadline_s=deadline_s, meter=meter)
            await story(model, slates, meter)

    asyncio.run(asyncio.wait_for(run(), 30))


async def settled(slates: FreshSlates) -> None:
    while slates.pending:
        await asyncio.sleep(0.005)


def figure(meter: Meter, name: str, **labels: str) -> float:
    return meter.registry.get_sample_value(f"ray_{name}", labels) or 0.0


def test_requests_during_a_flight_lead_to_one_more_and_no_more(valkey: str) -> None:
    async def story(model: Model, slates: FreshSlates, meter: Meter) -> None:
        for _ in range(5):
            slates.start("ann", "v1")
            await asyncio.sleep(0)
        slates.start("ann", "v2")  # another version is another flight
        while len(model.asked) < 2:
            await asyncio.sleep(0)
        assert [(request.user_id, request.version) for request in model.asked] == [("ann", "v1"), ("ann", "v2")]
        model.may.set()
        await settled(slates)
        assert model.users == ["ann"] * 3
        assert figure(meter, "rankgr_triggers_total", outcome="joined") == 4
        assert figure(meter, "rankgr_fresh_slates_total", outcome="stored") == 3

    tell(valkey, story)


def test_the_queue_has_an_end_and_old_slates_yield_to_triggers(valkey: str) -> None:
    async def story(model: Model, slates: FreshSlates, meter: Meter) -> None:
        for user in ("a", "b", "c"):
            slates.revalidate(user, "v1")
        assert slates.pending == 2  # half of the queue is kept for those who wait
        for user in ("d", "e"):
            slates.start(user, "v1")
        with pytest.raises(Overloaded) as caught:
            slates.start("f", "v1")
        assert caught.value.retry_after_s >= 1
        model.may.set()
        await settled(slates)
        assert sorted(model.users) == ["a", "b", "d", "e"]
        assert figure(meter, "rankgr_triggers_total", outcome="shed") == 1
        assert figure(meter, "rankgr_pending_slates") == 0

    tell(valkey, story)


def test_an_old_slate_is_computed_once_by_all_replicas_together(valkey: str) -> None:
    async def story(model: Model, slates: FreshSlates, meter: Meter) -> None:
        model.may.set()
        async with AsyncSlateReader(valkey) as reader:
            other = FreshSlates(model.compute, UserActivity(reader), max_pending=4, deadline_s=30, meter=Meter())
            for replica in (slates, other, slates, other):
                replica.revalidate("ann", "v1")
                await settled(replica)
        assert model.users == ["ann"]

    tell(valkey, story)


def test_what_is_late_or_fails_is_given_up(valkey: str) -> None:
    async def story(model: Model, slates: FreshSlates, meter: Meter) -> None:
        slates.start("slow", "v1")
        await settled(slates)
        assert figure(meter, "rankgr_fresh_slates_total", outcome="late") == 1
        model.may.set()
        slates.start("broken", "v1")
        await settled(slates)
        assert figure(meter, "rankgr_fresh_slates_total", outcome="failed") == 1

    tell(valkey, story, deadline_s=0.05)
