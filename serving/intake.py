"""Takes events in: first into the stream, from which nothing is lost, then into the users' recent events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from infra.activity import UserActivity
from infra.errors import ServiceError
from infra.event_stream import Event

_MAX_WRITES = 256
"""Batches of events under way in one replica; more are refused."""


class Overloaded(ServiceError):  # noqa: N818 - a state, and what callers are told of it
    """Too much at once.

    Args:
        what: there is too much of.
        retry_after_s: when to come back.
    """

    def __init__(self, what: str, *, retry_after_s: int = 1) -> None:
        super().__init__(what, mend="try again after the seconds of Retry-After")
        self.retry_after_s = retry_after_s


class Writer(Protocol):
    """Where events are kept (`infra.event_stream.AsyncEventWriter`)."""

    async def append(self, events: Sequence[Event]) -> None:
        """Write events behind those that are there."""
        ...

    async def close(self) -> None:
        """Give the connections back."""
        ...


class EventIntake:
    """Events of users, from an event loop.

    Args:
        writer: the stream.
        activity: recent events.
    """

    def __init__(self, writer: Writer, activity: UserActivity) -> None:
        self.writer, self.activity = writer, activity
        self._writes = 0

    async def take(self, events: Sequence[Event]) -> None:
        """Keep events.

        Raises:
            Overloaded: many batches are under way; none of these was kept.
            ServiceError: Redis does not answer. Some may have been kept: sent again with the same ids, they count once.
        """
        if self._writes >= _MAX_WRITES:
            raise Overloaded("too many events are being written")
        self._writes += 1
        try:
            await self.writer.append(events)
            await self.activity.record(events)
        finally:
            self._writes -= 1
