"""The HTTP face: a FastAPI application over `Retrieval`, free of Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from infra.errors import ConfigError, DataError, RankGRError, ServiceError
from infra.event_stream import Event
from infra.logs import get_logger
from infra.metrics import Meter
from serving.auth import RequireToken
from serving.intake import EventIntake, Overloaded
from serving.models import (
    DEFAULT_K,
    MAX_SEGMENT,
    MAX_USERS,
    Accepted,
    BatchAnswer,
    BatchRequest,
    EarlyRequest,
    EventsAccepted,
    EventsRequest,
    Health,
    UsersAnswer,
    errors,
    event_of,
)
from serving.page import page_routes
from serving.plain_slate import JSON, PATH, Lookup, PlainSlate, answering
from serving.repeats import name_of
from serving.request_id import RequestId
from serving.retrieval import HistoryAnswer, ItemAnswer, Retrieval
from serving.slate_json import Answer, SlateAnswer
from serving.stats import Reports, Stats, StatsAnswer

_NOT_VALID, _SEE_DOCS = "the request is not valid", "see /docs for its form"


class Trigger(Protocol):
    """Starts computing slates (`serving.flights.FreshSlates`)."""

    def admit(self, user_id: str, version: str) -> None:
        """Raise `Overloaded` where `start` would."""
        ...

    def start(self, user_id: str, version: str) -> None:
        """Start computing a user's slate of a version, and return before it is done."""
        ...


class Api(FastAPI):
    """FastAPI behind the one route that goes without it; Ray Serve looks for the routes of a FastAPI."""

    plain: PlainSlate
    echo_request_id: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if not await self.plain.answered(scope, send, echo_request_id=self.echo_request_id):
            await super().__call__(scope, receive, send)


def create_api(
    retrieval: Retrieval,
    *,
    slate_size: int,
    intake: EventIntake | None = None,
    trigger: Trigger | None = None,
    reports: Reports | None = None,
    token_digests: Sequence[str] = (),
    echo_request_id: bool = True,
) -> FastAPI:
    """The application.

    Args:
        retrieval: answers the requests.
        slate_size: the largest k.
        intake: keeps events; None: there is no stream.
        trigger: starts the computation of fresh slates; None: there is no model.
        reports: count what is answered here, and know what other replicas counted.
        token_digests: of the tokens one of which every POST must bring; empty: none is asked for.
        echo_request_id: see `serving.request_id.RequestId`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        with answering(api.plain):
            yield
        await retrieval.reader.close()
        if intake is not None:
            await intake.writer.close()

    reports = reports or Reports(Stats(Meter()))
    counts = reports.own
    api = Api(title="RankGR", lifespan=lifespan)
    if token_digests:
        api.add_middleware(RequireToken, digests=token_digests)
    api.add_middleware(RequestId, echo=echo_request_id)  # outermost
    api.add_exception_handler(RankGRError, _our_error)
    api.add_exception_handler(RequestValidationError, _bad_input)
    api.add_exception_handler(HTTPException, _http_error)
    bearer = [Depends(HTTPBearer(auto_error=False))] if token_digests else []  # for the page; the middleware is what refuses
    look_up = _counted(retrieval, counts)
    api.plain, api.echo_request_id = PlainSlate(look_up, default_k=min(DEFAULT_K, slate_size), max_k=slate_size), echo_request_id
    api.include_router(_slates(retrieval, look_up, slate_size, bearer))  # first: Ray Serve tries the routes one by one at every request
    api.include_router(page_routes(needs_token=bool(token_digests)))
    api.include_router(_operations(retrieval, reports))
    api.include_router(_intake(retrieval, counts, intake, trigger, bearer))
    return api


def _operations(retrieval: Retrieval, reports: Reports) -> APIRouter:
    """Health, readiness, figures."""
    api = APIRouter()

    @api.get("/metrics", include_in_schema=False)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await reports.text(), media_type="text/plain; version=0.0.4")

    @api.get("/v1/stats", responses=errors(503))
    async def summary() -> StatsAnswer:
        return await reports.summary()

    @api.get("/healthz", responses=errors(503))
    async def healthz() -> Health:
        return Health(status="alive")

    @api.get("/readyz", responses=errors(503))
    async def readyz() -> Health:
        return Health(status="ready", model_version=await retrieval.ready())

    return api


def _counted(retrieval: Retrieval, counts: Stats) -> Lookup:
    async def look_up(user_ids: Sequence[str], k: int, segment: str = "") -> list[Answer]:
        start = time.perf_counter()
        answers = await retrieval.slates(user_ids, k, segment)
        counts.answered(answers, time.perf_counter() - start)
        return answers

    return look_up


def _slates(retrieval: Retrieval, look_up: Lookup, slate_size: int, bearer: list[Any]) -> APIRouter:
    """What is read: slates, histories, items. Slates come as JSON from the look-up: their models only describe them."""
    api = APIRouter()

    @api.get("/v1/users", responses=errors(401, 422, 503), dependencies=bearer)
    async def users(limit: int = Query(DEFAULT_K, ge=1, le=MAX_USERS)) -> UsersAnswer:
        """Some users to look at, those seen last first."""
        return UsersAnswer(user_ids=await retrieval.activity.users(await retrieval.reader.active_version(), limit))

    # `:path` lets ids hold slashes: they are opaque.
    @api.get(PATH, response_model=SlateAnswer, responses=errors(422, 503))
    async def slate(
        user_id: str, k: int = Query(min(DEFAULT_K, slate_size), ge=1, le=slate_size), segment: str = Query("", max_length=MAX_SEGMENT)
    ) -> Response:
        (answer,) = await look_up([user_id], k, segment)
        return Response(answer.body, media_type=JSON)

    @api.post("/v1/slates:batch", response_model=BatchAnswer, responses=errors(401, 422, 503), dependencies=bearer)
    async def slates(body: BatchRequest) -> Response:
        answers = await look_up(body.user_ids, min(body.k, slate_size), body.segment)
        bodies = [part for answer in answers for part in (b",", answer.body)]
        return Response(b"".join((b'{"slates":[', *bodies[1:], b"]}")), media_type=JSON)

    @api.get("/v1/users/{user_id:path}/history", responses=errors(422, 503))
    async def history(user_id: str) -> HistoryAnswer:
        return await retrieval.history(user_id)

    @api.get("/v1/items/{item_id:path}", response_model=ItemAnswer, responses=errors(404, 422, 503))
    async def item(item_id: str) -> ItemAnswer | JSONResponse:
        found = retrieval.item(item_id)
        return found or _error(404, "the catalogue has no such item", "check the id")

    return api


def _intake(retrieval: Retrieval, counts: Stats, intake: EventIntake | None, trigger: Trigger | None, bearer: list[Any]) -> APIRouter:
    """What comes in: events and early requests."""
    api = APIRouter(dependencies=bearer)

    async def take(new: Sequence[Event]) -> None:
        if intake is None:
            raise ServiceError("this service has no stream to keep events in", mend="start it with a slate store")
        await intake.take(new)
        counts.meter.count("rankgr_events", len(new))

    @api.post("/v1/events", status_code=202, responses=errors(401, 422, 429, 503))
    async def events(body: EventsRequest, request: Request) -> EventsAccepted:
        name = name_of(request.scope)
        new = [event_of(event, event.user_id, place, name) for place, event in enumerate(body.events)]
        await take(new)
        return EventsAccepted(event_ids=[event.event_id for event in new])

    @api.post("/v1/requests", status_code=202, responses=errors(401, 422, 429, 503))
    async def early(body: EarlyRequest, request: Request) -> Accepted:
        if trigger is None:
            raise ServiceError("this service has no model to compute slates with", mend="start it with a bundle")
        version, name = await retrieval.ready(), name_of(request.scope)
        new = [event_of(event, body.user_id, place, name) for place, event in enumerate(body.events)]
        trigger.admit(body.user_id, version)  # before the events are kept: refused, the whole request can be sent again
        if new:
            await take(new)
        else:
            await retrieval.activity.saw(body.user_id)
        try:
            trigger.start(body.user_id, version)
        except Overloaded:
            if not new:
                raise
            return Accepted(user_id=body.user_id, model_version=version, status="shed")  # others came first while the events were written
        return Accepted(user_id=body.user_id, model_version=version)

    return api


def _error(status: int, what: str, mend: str, **more: Any) -> JSONResponse:
    return JSONResponse({"what": what, "mend": mend, **more}, status_code=status)


async def _our_error(_: Request, error: Exception) -> JSONResponse:
    # `where` may name addresses inside the cluster: it stays in the log.
    if not isinstance(error, RankGRError):
        raise error
    status = 422 if isinstance(error, DataError | ConfigError) else 503 if isinstance(error, ServiceError) else 500
    if isinstance(error, Overloaded):
        status = 429
    elif status >= 500:
        get_logger("ingress").error(error.what, where=error.where)
    answer = _error(status, error.what, error.mend)
    if status in (429, 503):
        answer.headers["Retry-After"] = str(getattr(error, "retry_after_s", 1))
    return answer


async def _bad_input(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    problems = [{"where": _text(".".join(map(str, problem["loc"]))), "what": _text(problem["msg"])} for problem in error.errors()]
    return _error(422, _NOT_VALID, _SEE_DOCS, problems=problems)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    """What the framework refuses, in the form of all our errors: no such route or method, a body that cannot be read at all."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 400:
        return _error(422, _NOT_VALID, _SEE_DOCS)
    answer = _error(error.status_code, str(error.detail), _SEE_DOCS)
    answer.headers.update(error.headers or {})
    return answer


def _text(value: str) -> str:
    """Fit for an answer: names of fields come from the caller, and half of a surrogate pair is no UTF-8."""
    return value.encode(errors="replace").decode()
