"""The HTTP face: a FastAPI application over `Retrieval`, free of Ray."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from infra.errors import ConfigError, DataError, RankGRError, ServiceError
from infra.logs import get_logger
from serving.auth import RequireToken
from serving.retrieval import HistoryAnswer, ItemAnswer, Retrieval, SlateAnswer

DEFAULT_K = 20
MAX_BATCH = 1000
MAX_EVENTS = 200

Trigger = Callable[[str, list[tuple[str, int]]], Awaitable[None]]
Observe = Callable[[str, float], None]
UserId = Annotated[str, Field(min_length=1, max_length=1024)]


class BatchRequest(BaseModel):
    """Users whose slates are wanted."""

    model_config = ConfigDict(extra="forbid")
    user_ids: list[UserId] = Field(min_length=1, max_length=MAX_BATCH)
    k: int = Field(DEFAULT_K, ge=1)


class BatchAnswer(BaseModel):
    """One slate a user, in the order they were asked for."""

    slates: list[SlateAnswer]


class NewEvent(BaseModel):
    """Something a user has just done."""

    model_config = ConfigDict(extra="forbid")
    item_id: str = Field(min_length=1)
    level: int = Field(2, ge=1, le=4)


class EarlyRequest(BaseModel):
    """A user who is about to ask for a slate, and what happened since the last one."""

    model_config = ConfigDict(extra="forbid")
    user_id: UserId
    events: list[NewEvent] = Field([], max_length=MAX_EVENTS)


class Accepted(BaseModel):
    """The slate is being computed."""

    user_id: str
    status: str = "accepted"


class Health(BaseModel):
    """State of the service."""

    status: str
    model_version: str | None = None


def create_api(
    retrieval: Retrieval,
    *,
    slate_size: int,
    trigger: Trigger | None = None,
    observe: Observe | None = None,
    token_digests: Sequence[str] = (),
) -> FastAPI:
    """The application.

    Args:
        retrieval: answers the requests.
        slate_size: the largest k.
        trigger: starts the computation of a fresh slate and returns before it is done; None: there is no model.
        observe: is told the source of each slate and the seconds it took.
        token_digests: of the tokens one of which every POST must bring; empty: none is asked for.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        yield
        await retrieval.reader.close()

    api = FastAPI(title="RankGR", lifespan=lifespan)
    if token_digests:
        api.add_middleware(RequireToken, digests=token_digests)
    api.add_exception_handler(RankGRError, _our_error)
    api.add_exception_handler(RequestValidationError, _bad_input)

    async def timed(user_ids: Sequence[str], k: int) -> list[SlateAnswer]:
        start = time.perf_counter()
        answers = await retrieval.slates(user_ids, k)
        if observe is not None:
            seconds = (time.perf_counter() - start) / len(answers)
            for answer in answers:
                observe(answer.source, seconds)
        return answers

    @api.get("/healthz")
    async def healthz() -> Health:
        return Health(status="alive")

    @api.get("/readyz")
    async def readyz() -> Health:
        return Health(status="ready", model_version=await retrieval.ready())

    # `:path` lets ids hold slashes: they are opaque.
    @api.get("/v1/users/{user_id:path}/slate")
    async def slate(user_id: str, k: int = Query(min(DEFAULT_K, slate_size), ge=1, le=slate_size)) -> SlateAnswer:
        return (await timed([user_id], k))[0]

    @api.post("/v1/slates:batch")
    async def slates(body: BatchRequest) -> BatchAnswer:
        return BatchAnswer(slates=await timed(body.user_ids, min(body.k, slate_size)))

    @api.get("/v1/users/{user_id:path}/history")
    async def history(user_id: str) -> HistoryAnswer:
        return await retrieval.history(user_id)

    @api.get("/v1/items/{item_id:path}", response_model=ItemAnswer)
    async def item(item_id: str) -> ItemAnswer | JSONResponse:
        found = retrieval.item(item_id)
        return found or _error(404, "the catalogue has no such item", "check the id")

    @api.post("/v1/requests", status_code=202)
    async def early(body: EarlyRequest) -> Accepted:
        if trigger is None:
            raise ServiceError("this service has no model to compute slates with", mend="start it with a bundle")
        await trigger(body.user_id, [(event.item_id, event.level) for event in body.events])
        return Accepted(user_id=body.user_id)

    return api


def _error(status: int, what: str, mend: str, **more: Any) -> JSONResponse:
    return JSONResponse({"what": what, "mend": mend, **more}, status_code=status)


async def _our_error(_: Request, error: Exception) -> JSONResponse:
    # `where` may name addresses inside the cluster: it stays in the log.
    if not isinstance(error, RankGRError):
        raise error
    status = 422 if isinstance(error, DataError | ConfigError) else 503 if isinstance(error, ServiceError) else 500
    if status >= 500:
        get_logger("ingress").error(error.what, where=error.where)
    return _error(status, error.what, error.mend)


async def _bad_input(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    problems = [{"where": ".".join(map(str, problem["loc"])), "what": problem["msg"]} for problem in error.errors()]
    return _error(422, "the request is not valid", "see /docs for its form", problems=jsonable_encoder(problems))
