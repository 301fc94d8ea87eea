"""Events over HTTP: kept in the stream and in the user's history, once each, within limits. A real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
import redis

from infra.activity import MAX_RECENT, UserActivity
from infra.event_stream import AsyncEventWriter, Event, EventStream
from infra.local import free_port
from infra.slate_store import AsyncSlateReader, SlateStore, UserHistory
from serving import intake as intake_module
from serving.api import create_api
from serving.intake import EventIntake, Overloaded
from serving.models import MAX_EVENTS
from serving.retrieval import Retrieval

NOW = time.time_ns() // 1_000_000


def tell(url: str, story: Callable[[httpx.AsyncClient], Awaitable[None]], writer: Any = None, trigger: Any = None) -> None:
    async def run() -> None:
        async with AsyncSlateReader(url) as reader:
            retrieval = Retrieval(reader, None, slate_size=5)
            intake = EventIntake(writer or AsyncEventWriter(url), retrieval.activity)
            api = create_api(retrieval, slate_size=5, intake=intake, trigger=trigger or NoTrigger())
            async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
                await story(client)

    asyncio.run(run())


class NoTrigger:
    def admit(self, user_id: str, version: str) -> None: ...

    def start(self, user_id: str, version: str) -> None: ...


async def items_of(client: httpx.AsyncClient, user: str) -> list[tuple[str, int]]:
    history = (await client.get(f"/v1/users/{user}/history")).json()
    return [(event["item_id"], event["level"]) for event in history["events"]]


def test_events_reach_the_stream_and_the_history(valkey: str) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        batch = [
            {"user_id": "ann", "item_id": "a", "level": 3, "event_id": "e1", "timestamp_ms": NOW, "request_id": "r"},
            {"user_id": "bob", "item_id": "b"},
            {"user_id": "bob", "item_id": "a"},
        ]
        answer = await client.post("/v1/events", json={"events": batch})
        assert answer.status_code == 202
        ids = answer.json()["event_ids"]
        assert ids[0] == "e1"
        assert len(set(ids)) == 3
        again = await client.post("/v1/events", json={"events": batch[:1]})
        assert again.json()["event_ids"] == ["e1"]
        assert await items_of(client, "ann") == [("a", 3)]
        assert await items_of(client, "bob") == [("b", 2), ("a", 2)]  # in the order of the batch

    tell(valkey, story)
    with EventStream(valkey) as stream:
        events = [event for _, event in stream.read(10)]
        assert [(event.user_id, event.item_id) for event in events] == [("ann", "a"), ("bob", "b"), ("bob", "a")]
        assert events[0] == Event("e1", "ann", "a", 3, NOW, "r")
        assert stream.rejected == {"duplicate": 1}


def test_what_a_timeline_holds_is_not_counted_again(valkey: str) -> None:
    with SlateStore(valkey) as store:
        store.publish_histories([UserHistory("ann", ("a", "b"), (3, 2), until=NOW - 1000)])

    async def story(client: httpx.AsyncClient) -> None:
        at = [NOW, NOW - 1000, NOW - 500]
        batch = [{"user_id": "ann", "item_id": f"at{i}", "timestamp_ms": when} for i, when in enumerate(at)]
        assert (await client.post("/v1/events", json={"events": batch})).status_code == 202
        assert await items_of(client, "ann") == [("a", 3), ("b", 2), ("at2", 2), ("at0", 2)]

    tell(valkey, story)


def test_recent_events_are_bounded_and_expire(valkey: str) -> None:
    events = [Event(f"e{i}", "ann", f"i{i}", 2, NOW + i) for i in range(MAX_RECENT + 5)]

    async def run() -> None:
        async with AsyncSlateReader(valkey) as reader:
            activity = UserActivity(reader)
            await activity.record(events)
            history = await activity.history("ann")
            assert (len(history.item_ids), history.item_ids[0]) == (MAX_RECENT, "i5")
            assert await activity.histories(["eve", "ann"]) == [UserHistory("eve", (), ()), history]
            assert await activity.claim("v1", "ann", 60)
            assert not await activity.claim("v1", "ann", 60)
            assert await activity.claim("v2", "ann", 60)

    asyncio.run(run())
    with redis.Redis.from_url(valkey) as client:
        assert 0 < client.pttl("rankgr:recent:ann") <= 72 * 3_600_000 * 1.1
        assert client.zrange("rankgr:seen", 0, -1) == [b"ann"]


@pytest.mark.parametrize(
    "event",
    [
        {"item_id": "i"},
        {"user_id": "", "item_id": "i"},
        {"user_id": "u" * 1025, "item_id": "i"},
        {"user_id": "ü" * 600, "item_id": "i"},
        {"user_id": "u", "item_id": "i", "level": 5},
        {"user_id": "u", "item_id": "i", "timestamp_ms": -1},
        {"user_id": "u", "item_id": "i", "timestamp_ms": NOW + 3_600_000},
        {"user_id": "u", "item_id": "i", "timestamp_ms": NOW // 1000},
        {"user_id": "u", "item_id": "i", "colour": "red"},
    ],
)
def test_events_that_cannot_be_used_are_refused(valkey: str, event: dict[str, Any]) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "fine"}, event]})
        assert answer.status_code == 422
        assert answer.json()["problems"][0]["where"].startswith("body.events.1")
        assert await items_of(client, "u") == []

    tell(valkey, story)


def test_what_is_accepted_fits_into_the_stream_however_json_writes_it(valkey: str) -> None:
    longest = {"user_id": "u" * 1024, "item_id": "i" * 1024, "event_id": "e" * 1024, "request_id": "r" * 1024}

    async def story(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/events", json={"events": [longest]})).status_code == 202
        escaped = longest | {"item_id": "\x01" * 1024}  # six bytes each
        refused = await client.post("/v1/events", json={"events": [longest, escaped]})
        assert refused.status_code == 422
        assert "event 1 takes" in refused.json()["what"]

    tell(valkey, story)
    with EventStream(valkey) as stream:
        assert [event.event_id for _, event in stream.read(10)] == ["e" * 1024]
        assert stream.rejected == {}


def test_events_that_were_kept_are_not_refused_when_others_take_the_last_place_meanwhile(valkey: str) -> None:
    with SlateStore(valkey) as store:
        store.complete("v1", users=0)
        store.activate("v1")

    class Full(NoTrigger):
        def start(self, user_id: str, version: str) -> None:
            raise Overloaded("too many slates are being computed")

    async def story(client: httpx.AsyncClient) -> None:
        kept = await client.post("/v1/requests", json={"user_id": "ann", "events": [{"item_id": "a"}]})
        assert (kept.status_code, kept.json()["status"]) == (202, "shed")
        assert await items_of(client, "ann") == [("a", 2)]
        assert (await client.post("/v1/requests", json={"user_id": "ann"})).status_code == 429  # nothing was to be kept

    tell(valkey, story, trigger=Full())


def test_a_request_that_the_proxy_repeats_keeps_its_events_once(valkey: str) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        name = {"X-RankGR-Name": "01700000000000000000-0123abcd"}
        body = {"events": [{"user_id": "ann", "item_id": "a"}, {"user_id": "ann", "item_id": "b"}]}
        answers = [(await client.post("/v1/events", json=body, headers=name)).json() for _ in range(2)]
        assert answers[0] == answers[1]
        assert await items_of(client, "ann") == [("a", 2), ("b", 2)]

    tell(valkey, story)
    with EventStream(valkey) as stream:
        assert len(stream.read(10)) == 2


def test_a_batch_has_a_limit(valkey: str) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        many = [{"user_id": "u", "item_id": "i"}] * (MAX_EVENTS + 1)
        assert (await client.post("/v1/events", json={"events": many})).status_code == 422
        assert (await client.post("/v1/events", json={"events": []})).status_code == 422
        assert (await client.post("/v1/events", json={"events": many[1:]})).status_code == 202

    tell(valkey, story)


def test_too_many_writers_are_told_to_come_back(valkey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "_MAX_WRITES", 2)
    go, started = asyncio.Event(), []

    class Slow:
        async def append(self, events: Sequence[Event]) -> None:
            started.append(events)
            await go.wait()

        async def close(self) -> None:
            pass

    async def story(client: httpx.AsyncClient) -> None:
        body = {"events": [{"user_id": "u", "item_id": "i"}]}
        waiting = [asyncio.create_task(client.post("/v1/events", json=body)) for _ in range(2)]
        while len(started) < 2:
            await asyncio.sleep(0)
        refused = await client.post("/v1/events", json=body)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        go.set()
        assert [(await task).status_code for task in waiting] == [202, 202]

    tell(valkey, story, Slow())


def test_a_store_that_does_not_answer_is_said() -> None:
    async def story(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "i"}]})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")

    tell(f"redis://127.0.0.1:{free_port()}", story)


def test_every_route_declares_its_errors(valkey: str) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert {"202", "401", "422", "429", "503"} <= set(paths["/v1/events"]["post"]["responses"])
        for path, methods in paths.items():
            for method, route in methods.items():
                for status in ("429", "503"):
                    if status in route["responses"]:
                        assert "Retry-After" in route["responses"][status]["headers"], path
                assert method == "get" or "401" in route["responses"]

    tell(valkey, story)
