"""The proxy's middleware: a request whose replica died is done again, whole, under the same name, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.plain_slate import AnswerHere
from serving.repeats import RepeatAfterDeath, middlewares, name_of


class Replicas:
    """Dies over the first requests, as Ray Serve's proxy shows it: the answer does not begin, or does not end."""

    def __init__(self, deaths: int, begin: bool = False) -> None:
        self.deaths, self.begin = deaths, begin
        self.bodies: list[bytes] = []
        self.names: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append(await Request(scope, receive).body())
        self.names.append(name_of(scope))
        if len(self.bodies) > self.deaths:
            await PlainTextResponse("done")(scope, receive, send)
        elif self.begin:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half of", "more_body": True})


def tell(app: ASGIApp, story: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await story(client)

    asyncio.run(run())


@pytest.mark.parametrize("begin", [False, True])
def test_a_request_whose_replica_died_is_done_again_with_its_body_and_name(begin: bool) -> None:
    replicas = Replicas(deaths=2, begin=begin)

    async def story(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/events", content=b"body", headers={"X-RankGR-Name": "00000000000000000001-forged00"})
        assert (answer.status_code, answer.text) == (200, "done")

    tell(RepeatAfterDeath(replicas), story)
    assert replicas.bodies == [b"body"] * 3
    assert len(set(replicas.names)) == 1
    assert "forged" not in replicas.names[0]


def test_a_request_that_kills_every_replica_is_given_up_with_a_declared_error() -> None:
    replicas = Replicas(deaths=99)

    async def story(client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/users/u/slate")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert set(answer.json()) == {"what", "mend"}

    tell(RepeatAfterDeath(replicas), story)
    assert len(replicas.bodies) == 3


def test_for_a_caller_who_has_left_nothing_is_repeated() -> None:
    attempts, sent = [], []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        attempts.append(await receive())

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(RepeatAfterDeath(app)(scope, receive, send))
    assert (len(attempts), sent) == (1, [])


def test_later_requests_have_later_names() -> None:
    names = [name_of({"type": "http", "headers": []}) for _ in range(3)]
    assert names == sorted(names)
    assert [one.cls for one in middlewares()] == [RepeatAfterDeath, AnswerHere]
