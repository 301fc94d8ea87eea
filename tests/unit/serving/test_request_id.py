"""One name from the HTTP request through the trigger to the model replica, on the lines of both. A real Valkey."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import structlog
from structlog.testing import capture_logs

from infra.config import load_config
from infra.event_stream import AsyncEventWriter
from infra.metrics import Meter
from infra.slate_store import AsyncSlateReader, SlateStore
from serving.api import create_api
from serving.flights import FreshSlates, Outcome, SlateRequest
from serving.intake import EventIntake
from serving.precompute import Precompute
from serving.retrieval import Retrieval
from tests.fakes import fake_loader, write_bundle


def test_the_lines_of_a_trigger_and_of_its_replica_carry_its_name(valkey: str, tmp_path: Path) -> None:
    with SlateStore(valkey) as store:
        store.complete("v1", users=0)
        store.activate("v1")
    lines = asyncio.run(_two_triggers_of_a_user(valkey, tmp_path))
    replica = [line for line in lines if line["event"] == "slates computed"]
    assert [(line["request_ids"], line["outcomes"]) for line in replica] == [(["first"], {"stored": 1}), (["third"], {"stored": 1})]
    ingress = [line for line in lines if line["event"] == "fresh slate"]
    assert [(line["request_id"], line["outcome"]) for line in ingress] == [("first", "stored"), ("third", "stored")]
    joined = [line["request_id"] for line in lines if line["event"] == "a computation is under way, another follows"]
    assert joined == ["second", "third"]


async def _two_triggers_of_a_user(valkey: str, folder: Path) -> list[Any]:
    """Log lines of three triggers, the second and third while the first is computed; events come with the second."""
    config = load_config(overrides=["decoding.slate_size=3"])
    replica, may = Precompute(config.to_json(), valkey, fake_loader("v1"), to_ray=False), asyncio.Event()
    await replica.reconfigure({write_bundle(folder): "v1"})

    async def compute(request: SlateRequest) -> Outcome:
        await may.wait()
        with structlog.contextvars.bound_contextvars(request_id=""):  # a replica is another process
            return (await replica.answer([request]))[0]

    async with AsyncSlateReader(valkey) as reader:
        retrieval = Retrieval(reader, None, slate_size=3)
        fresh = FreshSlates(compute, retrieval.activity, max_pending=4, deadline_s=30, meter=Meter())
        intake = EventIntake(AsyncEventWriter(valkey), retrieval.activity)
        api = create_api(retrieval, slate_size=3, trigger=fresh, intake=intake)
        with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
                for name in ("first", "second", "third"):
                    events = [{"item_id": "item-03"}] if name == "second" else []
                    answer = await client.post("/v1/requests", json={"user_id": "ann", "events": events}, headers={"X-Request-ID": name})
                    assert (answer.status_code, answer.headers["X-Request-ID"]) == (202, name)
                may.set()
                async with asyncio.timeout(30):
                    while fresh.pending:
                        await asyncio.sleep(0.005)
        await intake.writer.close()
        await replica.reader.close()
    return lines
