"""What callers send and get: bodies of requests with their limits, answers, and the errors that each route declares."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from infra.errors import DataError
from infra.event_stream import Event, Limits, entry_bytes
from serving.slate_json import SlateAnswer

DEFAULT_K = 20
MAX_BATCH = 1000
MAX_USERS = 100
MAX_EVENTS = 1000
MAX_EARLY_EVENTS = 200
MAX_SEGMENT = 200
_LIMITS = Limits()
_MAX_ID_BYTES = 1024


def _short(text: str) -> str:
    if len(text.encode()) > _MAX_ID_BYTES:
        raise ValueError(f"at most {_MAX_ID_BYTES} bytes of UTF-8")
    return text


Id = Annotated[str, Field(min_length=1, max_length=_MAX_ID_BYTES), AfterValidator(_short)]


class Body(BaseModel):
    """Base of requests: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class BatchRequest(Body):
    """Users whose slates are wanted; those without one get what is popular in the segment."""

    user_ids: list[Id] = Field(min_length=1, max_length=MAX_BATCH)
    k: int = Field(DEFAULT_K, ge=1)
    segment: str = Field("", max_length=MAX_SEGMENT)


class EarlyEvent(Body):
    """Something a user has just done; sent again under the same id it counts once."""

    item_id: Id
    level: int = Field(2, ge=1, le=4)
    event_id: Id | None = None
    timestamp_ms: int | None = Field(None, ge=0)
    request_id: Annotated[str, Field(max_length=_MAX_ID_BYTES), AfterValidator(_short)] = ""

    @model_validator(mode="after")
    def _now_or_lately(self) -> Self:
        age_ms = _now_ms() - self.timestamp_ms if self.timestamp_ms is not None else 0
        if age_ms < -_LIMITS.max_ahead_ms or (_LIMITS.max_age_ms is not None and age_ms > _LIMITS.max_age_ms):
            raise ValueError("timestamp_ms must be milliseconds since the epoch, not ahead of now and not older than a week")
        return self


class NewEvent(EarlyEvent):
    """Something that a user did."""

    user_id: Id


class EventsRequest(Body):
    """Events of one or more users, in the order in which they happened."""

    events: list[NewEvent] = Field(min_length=1, max_length=MAX_EVENTS)


class EventsAccepted(BaseModel):
    """The events are kept; ids in the order of the events."""

    event_ids: list[str]


class EarlyRequest(Body):
    """A user who is about to ask for a slate, and what happened since the last one."""

    user_id: Id
    events: list[EarlyEvent] = Field([], max_length=MAX_EARLY_EVENTS)


class Accepted(BaseModel):
    """The events are kept; the slate is being computed (`accepted`), or is not since there is too much to do (`shed`)."""

    user_id: str
    model_version: str
    status: Literal["accepted", "shed"] = "accepted"


class BatchAnswer(BaseModel):
    """One slate a user, in the order they were asked for."""

    slates: list[SlateAnswer]


class UsersAnswer(BaseModel):
    """Some users, those seen last first."""

    user_ids: list[str]


class Health(BaseModel):
    """State of the service."""

    status: str
    model_version: str | None = None


class Problem(BaseModel):
    """What is wrong, and the way out."""

    what: str
    mend: str
    problems: list[dict[str, str]] = []


_MEANINGS = {
    401: "A token is missing or not valid.",
    404: "There is no such thing.",
    422: "The request is not valid.",
    429: "Too much at once; come back after the seconds of Retry-After.",
    503: "A process or a service behind this one does not answer; come back after the seconds of Retry-After.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
_CHALLENGE = {"WWW-Authenticate": {"description": "The scheme to use.", "schema": {"type": "string"}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's declaration of the errors that a route may answer with."""
    headers = {401: _CHALLENGE, 429: _RETRY_AFTER, 503: _RETRY_AFTER}
    return {
        status: {"model": Problem, "description": _MEANINGS[status], **({"headers": headers[status]} if status in headers else {})}
        for status in statuses
    }


def event_of(event: EarlyEvent, user_id: str, place: int, name: str) -> Event:
    """An event as it is stored.

    Args:
        event: as it was sent.
        user_id: whose it is.
        place: of the event in its request.
        name: of the request (`serving.repeats.name_of`): an id is made from it, in the order of time, then of `place`.

    Raises:
        DataError: it is larger than what the stream takes.
    """
    start, _, end = name.partition("-")
    event_id = event.event_id or f"{start}-{place:04d}-{end}"
    made = Event(event_id, user_id, event.item_id, event.level, event.timestamp_ms or _now_ms(), event.request_id)
    if (size := entry_bytes(made)) > _LIMITS.max_bytes:
        raise DataError(f"event {place} takes {size} bytes as JSON, more than {_LIMITS.max_bytes}", mend="shorten its ids")
    return made


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
