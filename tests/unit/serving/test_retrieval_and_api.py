"""The HTTP face over a real Valkey, without Ray: slates, fallbacks, errors."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest

from infra import storage
from infra.activity import UserActivity
from infra.catalogue import Catalogue
from infra.local import free_port
from infra.metrics import Meter
from infra.slate_store import AsyncSlateReader, Slate, SlateStore, UserHistory
from serving.api import create_api
from serving.intake import Overloaded
from serving.models import MAX_BATCH
from serving.retrieval import Retrieval
from serving.stats import Report, Reports, Stats
from tests.fakes import item_id, write_bundle

SLATE_SIZE = 10
Story = Callable[[httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(write_bundle(tmp_path))


def tell(url: str, catalogue: Catalogue | None, story: Story, **options: Any) -> None:
    async def run() -> None:
        async with AsyncSlateReader(url) as reader:
            retrieval = Retrieval(reader, catalogue, slate_size=SLATE_SIZE, version="memory")
            api = create_api(retrieval, slate_size=SLATE_SIZE, **options)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
                await story(client)

    asyncio.run(run())


def publish(url: str, version: str, *users: str) -> None:
    now = time.time_ns() // 1_000_000 - 5000
    with SlateStore(url) as store:
        slates = [Slate(user, tuple(map(item_id, range(SLATE_SIZE))), tuple(range(SLATE_SIZE, 0, -1)), version, now) for user in users]
        store.publish(version, slates)
        store.publish_fallback(version, Slate("", (item_id(7),), (0.5,), version, now))
        store.publish_histories([UserHistory("ann", (item_id(1), "gone"), (3, 2))])
        store.complete(version, users=len(users))
        store.activate(version)


def test_a_user_gets_the_slate_that_was_computed(valkey: str, catalogue: Catalogue) -> None:
    publish(valkey, "v1", "ann", "a/b c")
    reports = Reports(Stats(Meter()))

    async def story(client: httpx.AsyncClient) -> None:
        answer = (await client.get("/v1/users/ann/slate", params={"k": 2})).json()
        assert answer["items"] == [
            {"item_id": "item-00", "title": "Title 0", "score": 10.0},
            {"item_id": "item-01", "title": "Title 1", "score": 9.0},
        ]
        assert (answer["user_id"], answer["model_version"], answer["source"]) == ("ann", "v1", "stored")
        assert 5 <= answer["age_s"] < 60
        assert (await client.get("/v1/users/a%2Fb%20c/slate")).json()["source"] == "stored"

        history = (await client.get("/v1/users/ann/history")).json()
        assert history["events"] == [
            {"item_id": "item-01", "title": "Title 1", "level": 3},
            {"item_id": "gone", "title": "", "level": 2},
        ]
        assert (await client.get("/v1/users/nobody/history")).json()["events"] == []
        assert (await client.get("/v1/items/item-03")).json()["title"] == "Title 3"
        assert (await client.get("/readyz")).json() == {"status": "ready", "model_version": "v1"}
        assert (await client.get("/healthz")).status_code == 200
        summary = (await client.get("/v1/stats")).json()
        assert (summary["by_source"], summary["hit_ratio"], summary["model_version"]) == ({"stored": 2}, 1.0, "v1")
        assert summary["latency_p50_ms"] > 0
        assert 'ray_rankgr_slates_total{replica="ingress",source="stored"} 2.0' in (await client.get("/metrics")).text

    tell(valkey, catalogue, story, reports=reports)


def test_some_users_are_named_those_seen_last_first(valkey: str, catalogue: Catalogue) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/users")).json() == {"user_ids": []}
        publish(valkey, "v1", "ann", "a/b c", "eve")
        async with AsyncSlateReader(valkey) as reader:
            await UserActivity(reader).saw("zoe")
            await UserActivity(reader).saw("eve")
        assert (await client.get("/v1/users")).json() == {"user_ids": ["eve", "zoe", "a/b c", "ann"]}
        assert (await client.get("/v1/users", params={"limit": 1})).json() == {"user_ids": ["eve"]}
        assert (await client.get("/v1/users", params={"limit": 0})).status_code == 422

    tell(valkey, catalogue, story)


def test_figures_are_those_of_all_replicas_asked_once_a_second(valkey: str, catalogue: Catalogue) -> None:
    publish(valkey, "v1", "ann")
    own, other, asked = Stats(Meter(), "one"), Stats(Meter(), "two"), []

    async def all_of_them() -> list[Report]:
        asked.append(1)
        return [own.report(), other.report()]

    async def story(client: httpx.AsyncClient) -> None:
        async with AsyncSlateReader(valkey) as reader:
            answers = await Retrieval(reader, catalogue, slate_size=SLATE_SIZE).slates(["ann", "eve"], 1)
        other.answered(answers, 0.5)
        for _ in range(5):
            await client.get("/v1/users/ann/slate")
            summary = (await client.get("/v1/stats")).json()
        assert (summary["replicas"], summary["by_source"]) == (2, {"stored": 6, "popular": 1})
        assert summary["latency_p99_ms"] > 400
        text = (await client.get("/metrics")).text
        assert 'ray_rankgr_slates_total{replica="one",source="stored"} 5.0' in text
        assert 'ray_rankgr_slates_total{replica="two",source="popular"} 1.0' in text

    tell(valkey, catalogue, story, reports=Reports(own, all_of_them))
    assert len(asked) < 4


def test_strangers_get_popular_items(valkey: str, catalogue: Catalogue) -> None:
    publish(valkey, "v1", "ann")

    async def story(client: httpx.AsyncClient) -> None:
        answers = (await client.post("/v1/slates:batch", json={"user_ids": ["ann", "eve", "ann"], "k": 3})).json()["slates"]
        assert [(answer["user_id"], answer["source"]) for answer in answers] == [("ann", "stored"), ("eve", "popular"), ("ann", "stored")]
        assert [item["item_id"] for item in answers[1]["items"]] == ["item-07"]

    tell(valkey, catalogue, story)


def test_a_damaged_slate_sends_its_own_user_to_the_fallback_and_is_computed_anew(valkey: str, catalogue: Catalogue) -> None:
    publish(valkey, "v1", "ann", "bob")
    told: list[tuple[str, str]] = []

    async def run() -> None:
        async with AsyncSlateReader(valkey) as reader:
            retrieval = Retrieval(reader, catalogue, slate_size=SLATE_SIZE)
            retrieval.revalidate = lambda user_id, version: told.append((user_id, version))
            for damaged in (b"no slate", b"\x01" + b"\xff" * 40, (await reader._redis.get(reader.keys.slate("v1", "bob")))[:-3]):
                await reader._redis.set(reader.keys.slate("v1", "ann"), damaged)
                answers = await retrieval.slates(["ann", "bob", "eve"], 1)
                assert [answer.source for answer in answers] == ["fallback", "stored", "popular"]
                assert (await retrieval.slate("bob", 1)).source == "stored"  # the store is not left alone for it

    asyncio.run(run())
    assert told == [("ann", "v1")] * 3


def test_popular_items_in_a_batch_are_of_the_version_of_its_slates(valkey: str, catalogue: Catalogue) -> None:
    publish(valkey, "v1", "ann")

    async def run() -> None:
        async with AsyncSlateReader(valkey) as reader:
            retrieval = Retrieval(reader, catalogue, slate_size=SLATE_SIZE, version="memory")
            look_up = reader.look_up

            async def then_another_is_shown(user_ids: Any) -> Any:
                found = await look_up(user_ids)
                with SlateStore(valkey) as store:
                    store.publish_fallback("v2", Slate("", (item_id(8),), (0.5,), "v2", 1))
                    store.complete("v2", users=0)
                    store.activate("v2")
                return found

            reader.look_up = then_another_is_shown  # type: ignore[method-assign]
            answers = await retrieval.slates(["ann", "eve"], 1)
            assert [(answer.source, answer.model_version) for answer in answers] == [("stored", "v1"), ("popular", "v1")]
            reader.look_up = look_up  # type: ignore[method-assign]
            assert [answer.model_version for answer in await retrieval.slates(["ann", "eve"], 1)] == ["v2", "v2"]

            publish(valkey, "v3", "ann")
            await reader._redis.delete(reader.keys.fallback("v3"))  # items in memory stand in
            assert [answer.model_version for answer in await retrieval.slates(["ann", "eve"], 1)] == ["v3", "v3"]

    asyncio.run(run())


def test_strangers_of_a_segment_get_what_is_popular_there(valkey: str, tmp_path: Path) -> None:
    publish(valkey, "v1", "ann")
    catalogue = Catalogue(write_bundle(tmp_path))
    catalogue.items = [item._replace(category="books" if place % 2 else "toys") for place, item in enumerate(catalogue.items)]
    catalogue.categories = frozenset({"books", "toys"})

    async def story(client: httpx.AsyncClient) -> None:
        async def first(segment: str) -> list[str]:
            answer = (await client.get("/v1/users/eve/slate", params={"k": 2, "segment": segment})).json()
            assert answer["source"] == "popular"
            return [item["item_id"] for item in answer["items"]]

        assert await first("toys") == ["item-28", "item-26"]
        assert await first("books") == ["item-29", "item-27"]
        assert await first("unheard-of") == ["item-07"]
        asked = {"user_ids": ["eve", "ann"], "k": 2, "segment": "toys"}
        stranger, known = (await client.post("/v1/slates:batch", json=asked)).json()["slates"]
        assert [item["item_id"] for item in stranger["items"]] == ["item-28", "item-26"]
        assert (stranger["source"], known["source"]) == ("popular", "stored")

    tell(valkey, catalogue, story)


def test_strangers_of_a_segment_of_users_get_what_is_popular_with_these(valkey: str, tmp_path: Path) -> None:
    publish(valkey, "v1", "ann")
    write_bundle(tmp_path)
    table = storage.read_table(str(tmp_path / "catalogue.parquet"))
    rows = table.to_pylist()
    rows[3]["segments"] = [{"segment": "north", "popularity": 9}, {"segment": "toys", "popularity": 1}]
    rows[4]["segments"] = [{"segment": "north", "popularity": 5}]
    storage.write_table(pa.Table.from_pylist(rows[::-1], schema=table.schema), str(tmp_path / "catalogue.parquet"))

    async def story(client: httpx.AsyncClient) -> None:
        async def first(segment: str) -> list[str]:
            answer = (await client.get("/v1/users/eve/slate", params={"k": 4, "segment": segment})).json()
            assert answer["source"] == "popular"
            return [item["item_id"] for item in answer["items"]]

        assert await first("north") == ["item-03", "item-04", "item-29", "item-28"]  # behind that, what is popular with all
        assert await first("toys") == ["item-03", "item-29", "item-28", "item-27"]  # goes before the category of that name
        assert await first("south") == ["item-07"]
        assert (await client.get("/v1/users/ann/slate", params={"segment": "north"})).json()["source"] == "stored"

    tell(valkey, Catalogue(str(tmp_path)), story)


def test_the_source_says_how_old_a_slate_is_and_a_stale_one_is_computed_anew(valkey: str, catalogue: Catalogue) -> None:
    now = time.time_ns() // 1_000_000
    ages = {"fresh": (60, True), "stored": (3600, True), "batch": (60, False), "stale": (90_000, True)}
    with SlateStore(valkey) as store:
        store.publish("v1", [Slate(u, (item_id(0),), (1.0,), "v1", now - age * 1000, fresh) for u, (age, fresh) in ages.items()])
        store.complete("v1", users=len(ages))
        store.activate("v1")
    told: list[tuple[str, str]] = []

    async def run() -> None:
        async with AsyncSlateReader(valkey) as reader:
            retrieval = Retrieval(reader, catalogue, slate_size=SLATE_SIZE)
            retrieval.revalidate = lambda user_id, version: told.append((user_id, version))
            answers = await retrieval.slates(list(ages), 1)
            assert [answer.source for answer in answers] == ["fresh", "stored", "stored", "stale"]
            assert answers[3].age_s == pytest.approx(90_000, abs=60)

    asyncio.run(run())
    assert told == [("stale", "v1")]


def test_a_request_has_a_name(valkey: str, catalogue: Catalogue) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        assert (await client.get("/healthz", headers={"X-Request-ID": "from.me-1"})).headers["X-Request-ID"] == "from.me-1"
        for forged in ("", "a\tb", "x" * 200, "a b"):
            answer = await client.get("/healthz", headers={"X-Request-ID": forged})
            assert answer.headers["X-Request-ID"] not in ("", forged)
        assert (await client.post("/v1/slates:batch", content=b"{")).headers["X-Request-ID"]

    tell(valkey, catalogue, story)


def test_before_anything_is_published_popular_items_come_from_memory(valkey: str, catalogue: Catalogue) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        answer = (await client.get("/v1/users/ann/slate", params={"k": 2})).json()
        assert (answer["source"], answer["model_version"]) == ("popular", "memory")
        assert [item["item_id"] for item in answer["items"]] == ["item-29", "item-28"]
        ready = await client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json() == {"what": "no slates are active", "mend": "run `rankgr precompute`"}

    tell(valkey, catalogue, story)


def test_redis_down_is_answered_from_memory_and_soon_tried_again(catalogue: Catalogue) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        for _ in range(20):
            answer = await client.get("/v1/users/ann/slate")
            assert answer.status_code == 200
            assert answer.json()["source"] == "fallback"
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200
        history = await client.get("/v1/users/ann/history")
        assert history.status_code == 503
        assert history.json()["what"] == "Redis does not answer"
        assert "127.0.0.1" not in history.text

    start = time.monotonic()
    tell(f"redis://127.0.0.1:{free_port()}", catalogue, story)
    assert time.monotonic() - start < 5, "a dead Redis was asked for every request"


def test_without_redis_and_catalogue_there_is_an_error() -> None:
    async def story(client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/users/ann/slate")
        assert answer.status_code == 503
        assert set(answer.json()) == {"what", "mend"}
        assert (await client.get("/v1/items/item-03")).status_code == 404

    tell(f"redis://127.0.0.1:{free_port()}", None, story)


def test_bad_input_is_refused_with_a_way_out(valkey: str, catalogue: Catalogue) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        refused = [
            await client.get("/v1/users/ann/slate", params={"k": 0}),
            await client.get("/v1/users/ann/slate", params={"k": SLATE_SIZE + 1}),
            await client.get("/v1/users/ann/slate", params={"k": "many"}),
            await client.get(f"/v1/users/{'x' * 2000}/slate"),
            await client.post("/v1/slates:batch", json={"user_ids": []}),
            await client.post("/v1/slates:batch", json={"user_ids": ["u"] * (MAX_BATCH + 1)}),
            await client.post("/v1/slates:batch", json={"user_ids": [""]}),
            await client.post("/v1/slates:batch", json={"user_ids": ["u"], "kk": 3}),
            await client.post("/v1/slates:batch", content=b"{"),
            await client.post("/v1/slates:batch", content=b"\xff"),
            await client.post("/v1/slates:batch", content=b'{"user_ids": ["\\ud800"], "\\udfff": 1}'),
            await client.post("/v1/slates:batch", content=b"[" * 100_000),
            await client.post("/v1/requests", json={"user_id": "u", "events": [{"item_id": "i", "level": 9}]}),
        ]
        for answer in refused:
            assert answer.status_code == 422, answer.text
            assert {"what", "mend"} <= set(answer.json())
        for unknown in (await client.get("/nowhere"), await client.delete("/healthz")):
            assert (unknown.status_code in (404, 405), set(unknown.json())) == (True, {"what", "mend"})
        largest = await client.post("/v1/slates:batch", json={"user_ids": ["u"] * MAX_BATCH, "k": 99})
        assert largest.status_code == 200

    tell(valkey, catalogue, story)


def test_an_early_request_is_accepted_and_handed_on(valkey: str, catalogue: Catalogue) -> None:
    handed: list[tuple[str, str]] = []

    class Handed:
        def admit(self, user_id: str, version: str) -> None:
            if user_id == "busy":
                raise Overloaded("too many slates are being computed", retry_after_s=3)

        def start(self, user_id: str, version: str) -> None:
            handed.append((user_id, version))

    async def story(client: httpx.AsyncClient) -> None:
        nothing = await client.post("/v1/requests", json={"user_id": "ann"})
        assert (nothing.status_code, nothing.headers["Retry-After"]) == (503, "1")
        publish(valkey, "v1", "ann")
        assert (await client.post("/v1/requests", json={"user_id": "ann"})).status_code == 202
        busy = await client.post("/v1/requests", json={"user_id": "busy"})
        assert (busy.status_code, busy.headers["Retry-After"]) == (429, "3")

    tell(valkey, catalogue, story, trigger=Handed())
    assert handed == [("ann", "v1")]

    async def without_model(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/requests", json={"user_id": "ann"})).status_code == 503
        assert (await client.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "i"}]})).status_code == 503

    tell(valkey, catalogue, without_model)


def test_the_page_needs_nothing_from_outside_and_may_not_be_framed(valkey: str, catalogue: Catalogue) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        page = await client.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        files = {path: await client.get(path) for path in re.findall(r'(?:href|src)="(/static/[^"]+)"', page.text)}
        assert set(files) == {"/static/icon.svg", "/static/style.css", "/static/script.js"}
        for file in (page, *files.values()):
            assert file.status_code == 200
            policy = file.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
        for text in (page.text, files["/static/script.js"].text, files["/static/style.css"].text):
            assert "://" not in text
            assert "innerHTML" not in text
        assert (await client.get("/static/../api.py")).status_code == 404
        assert (await client.get("/v1/stats")).json()["hit_ratio"] is None
        await client.get("/v1/users/ann/slate")
        assert (await client.get("/v1/stats")).json()["by_source"] == {"popular": 1}

    tell(valkey, catalogue, story)
