"""Slates as JSON, and the route that goes without the framework: the same answers as with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from infra.errors import ServiceError
from infra.slate_store import Slate
from serving.plain_slate import AnswerHere, PlainSlate, answering
from serving.request_id import request_id_of
from serving.slate_json import Answer, RankedItem, SlateAnswer, SlateWriter

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
scores = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(text, text, scores), max_size=6), text, st.integers(0, 7), st.floats(0, 1e9))
def test_the_json_is_the_one_that_the_model_describes(items: list[tuple[str, str, float]], user: str, k: int, age: float) -> None:
    titles = {item: title for item, title, _ in items}
    catalogue: Any = SimpleNamespace(get=lambda item: SimpleNamespace(title=titles[item]) if titles[item] != "" else None)
    slate = Slate(user, tuple(item for item, *_ in items), tuple(score for *_, score in items), "v1", 7)
    writer = SlateWriter(catalogue)
    for _ in range(2):  # the second time from parts that are kept
        answer = writer.answer(user, slate, k, age_s=age, source="stored")
        assert SlateAnswer.model_validate_json(answer.body, strict=True) == SlateAnswer(
            user_id=user,
            items=[RankedItem(item_id=item, title=titles[item], score=score) for item, _, score in items[:k]],
            model_version="v1",
            computed_at=7,
            age_s=round(age, 3),
            source="stored",
        )
        assert (answer.model_version, answer.age_s, answer.source) == ("v1", round(age, 3), "stored")


@pytest.mark.parametrize(
    ("target", "taken"),
    [
        ("/v1/users/ann/slate", ("ann", 3)),
        ("/v1/users/ann/slate?k=10", ("ann", 10)),
        ("/v1/users/a%2Fslate/slate?k=1", ("a/slate", 1)),
        ("/v1/users/ann/slate?k=11", None),
        ("/v1/users/ann/slate?k=0", None),
        ("/v1/users/ann/slate?k=+1", None),
        ("/v1/users/ann/slate?k=1&segment=toys", None),
        ("/v1/users//slate", None),
        ("/v1/users/slate", None),
        ("/v1/users/ann/history", None),
    ],
)
def test_only_what_cannot_be_wrong_is_taken(target: str, taken: tuple[str, int] | None) -> None:
    asked: list[tuple[str, int]] = []

    async def look_up(user_ids: Sequence[str], k: int, segment: str = "") -> list[Answer]:
        asked.append((user_ids[0], k))
        return [Answer(b"{}", "v1", 0.0, "stored")]

    answer = ask(target, look_up)
    assert asked == ([] if taken is None else [taken])
    assert answer.status_code == (404 if taken is None else 200)


def test_what_fails_is_left_to_the_framework() -> None:
    async def look_up(user_ids: Sequence[str], k: int, segment: str = "") -> list[Answer]:
        raise ServiceError("no slates")

    assert ask("/v1/users/ann/slate", look_up).status_code == 404


def test_the_framework_goes_on_under_the_name_that_the_request_was_given() -> None:
    named: list[str] = []

    async def look_up(user_ids: Sequence[str], k: int, segment: str = "") -> list[Answer]:
        named.append(structlog.contextvars.get_contextvars()["request_id"])
        raise ServiceError("no slates")

    async def framework(scope: Any, receive: Any, send: Any) -> None:
        named.append(request_id_of(scope))
        await PlainTextResponse("")(scope, receive, send)

    ask("/v1/users/ann/slate", look_up, framework)
    assert named[0] == named[1]


def test_where_the_application_runs_in_another_loop_everything_is_passed_on() -> None:
    async def look_up(user_ids: Sequence[str], k: int, segment: str = "") -> list[Answer]:
        raise AssertionError("this loop has no connection to the store")

    async def elsewhere() -> None:
        with answering(PlainSlate(look_up, default_k=3, max_k=10)):
            answer = await asyncio.to_thread(lambda: asyncio.run(get(AnswerHere(FastAPI()), "/v1/users/ann/slate")))
        assert answer.status_code == 404

    asyncio.run(elsewhere())


def test_an_answer_bears_the_name_of_its_request() -> None:
    async def look_up(user_ids: Sequence[str], k: int, segment: str = "") -> list[Answer]:
        return [Answer(b"{}", "v1", 0.0, "stored")]

    assert len(ask("/v1/users/ann/slate", look_up).headers["X-Request-ID"]) == 16


def ask(target: str, look_up: Any, framework: Any = None) -> httpx.Response:
    async def run() -> httpx.Response:
        with answering(PlainSlate(look_up, default_k=3, max_k=10)):
            return await get(AnswerHere(framework or FastAPI()), target)

    return asyncio.run(run())


async def get(app: Any, target: str) -> httpx.Response:
    """The answer of an ASGI application."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get(target)
