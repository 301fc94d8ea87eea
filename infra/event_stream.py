"""Redis Streams with what users do: written at least once, read in order, each event handed out once.

A writer that retries may write an event twice; the reader drops the second one by its id, within a window. The reader's
place is its own: a consumer group is put there before the first read and after every failed one, so that what was handed
out since a checkpoint comes again after a restart, in the same order. The group keeps count of what is not acknowledged
yet, which is done once a checkpoint that holds it is committed. This feeds RankGR's streaming training (3.4).

    {prefix}:events        one JSON object an entry
    {prefix}:quarantine    entries that cannot be used, with the reason, under the ids that they had

One reader a group: several would each see a part, and no position would say what was trained on.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from infra.errors import ServiceError
from infra.logs import get_logger
from infra.records import Level
from infra.redis_client import UNAVAILABLE, AsyncClient, client_options, service_error, url_error
from infra.slate_codec import Keys

__all__ = ["AsyncEventWriter", "Event", "EventStream", "Lag", "Limits"]

START = "0-0"
"""The position before the first entry."""
_FIELD = b"event"
_MAX_TEXT_BYTES = 1024
_MAX_BLOCK_MS = 2000  # well below the time limit of an answer
_ANSWER_S = 5.0
_QUARANTINED = 10_000
_PENDING = 1000
_TRIMMED = "trimmed before it was read"
_Entry = tuple[bytes, Mapping[bytes, bytes]]


@dataclass(frozen=True)
class Event:
    """What a user did.

    Attributes:
        event_id: the same for every copy of one event.
        level: of the feedback, 1..4.
        timestamp_ms: since the epoch, UTC.
        request_id: what was shown together; empty where that is not known.
    """

    event_id: str
    user_id: str
    item_id: str
    level: int
    timestamp_ms: int
    request_id: str = ""


@dataclass(frozen=True)
class Limits:
    """What an entry may be; time is judged against its arrival, so that it does not matter when it is read.

    Attributes:
        max_bytes: of an entry.
        max_ahead_ms: that its timestamp may lie after its arrival.
        max_age_ms: that its timestamp may lie before its arrival; None: as long ago as it likes, for backfills.
    """

    max_bytes: int = 8192
    max_ahead_ms: int = 300_000
    max_age_ms: int | None = 7 * 86_400_000


@dataclass(frozen=True)
class Lag:
    """How far a reader is behind: entries that it has not seen, and the age of the oldest of them in seconds."""

    entries: int
    seconds: float


class _UnusableError(ValueError):
    """Why an entry is quarantined."""


def encode_event(event: Event) -> bytes:
    """An event as it lies in the stream."""
    return json.dumps(asdict(event), ensure_ascii=False, separators=(",", ":")).encode()


def entry_bytes(event: Event) -> int:
    """Size of an event's entry, of which `Limits.max_bytes` is the limit: more than its ids' where JSON escapes their characters."""
    return len(_FIELD) + len(encode_event(event))


def _decode_event(fields: Mapping[bytes, bytes], arrived_ms: int, limits: Limits) -> Event:
    if sum(len(name) + len(value) for name, value in fields.items()) > limits.max_bytes:
        raise _UnusableError("too large")
    try:
        values = json.loads(fields.get(_FIELD, b""))
    except (ValueError, RecursionError):
        raise _UnusableError("not JSON") from None
    try:
        event = Event(**values)
    except TypeError:
        raise _UnusableError("fields are missing or unknown") from None
    texts = (event.event_id, event.user_id, event.item_id, event.request_id or "none")
    is_time = type(event.timestamp_ms) is int and 0 <= event.timestamp_ms < 1 << 63
    if not (all(map(_is_id, texts)) and isinstance(event.request_id, str) and is_time):
        raise _UnusableError("a field is of another type")
    if type(event.level) is not int or event.level not in set(Level):
        raise _UnusableError("unknown level")
    if event.timestamp_ms > arrived_ms + limits.max_ahead_ms:
        raise _UnusableError("from the future")
    if limits.max_age_ms is not None and event.timestamp_ms < arrived_ms - limits.max_age_ms:
        raise _UnusableError("too old")
    return event


def _is_id(value: object) -> bool:
    try:
        return isinstance(value, str) and 0 < len(value.encode()) <= _MAX_TEXT_BYTES
    except UnicodeEncodeError:
        return False


class AsyncEventWriter(AsyncClient):
    """Appends events, from an event loop that answers users.

    Args:
        url: redis:// or rediss:// URL.
        prefix: first part of every key.
        max_length: entries that the stream keeps, give or take a few; the oldest go first.
        timeout_s: limit of one attempt to connect or to get an answer.
        access: options of the client, see `infra.redis_client.access_of`.

    Raises:
        ConfigError: URL or prefix are not usable.
        ServiceError: by `append`, when Redis does not answer; the events may be there nevertheless, append them again.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "rankgr",
        max_length: int = 1_000_000,
        timeout_s: float = 0.5,
        access: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(url, prefix=prefix, timeout_s=timeout_s, access=access)
        self._max_length = max_length

    async def append(self, events: Sequence[Event]) -> None:
        """Write events behind those that are there, in one round trip."""
        if not events:
            return
        async with self._errors():
            pipe = self._redis.pipeline(transaction=False)
            for event in events:
                pipe.xadd(self.keys.events, {_FIELD: encode_event(event)}, maxlen=self._max_length, approximate=True)
            await pipe.execute()


class EventStream:
    """The reader of a group, synchronous.

    Args:
        url: redis:// or rediss:// URL.
        prefix: first part of every key.
        group: consumer group.
        consumer: name within the group.
        knows: whether an item is one that can be used; None takes all.
        limits: what an entry may be.
        window: ids of the latest so many events are kept to drop copies.
        access: options of the client, see `infra.redis_client.access_of`.

    Attributes:
        position: id of the last entry that was handed out, quarantined or dropped.
        seen: entries up to there.
        rejected: reason -> entries that were not handed out for it.

    Raises:
        ConfigError: URL or prefix are not usable.
        ServiceError: by every method, when Redis does not answer after a few retries with back-off.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "rankgr",
        group: str = "trainer",
        consumer: str = "trainer",
        knows: Callable[[str], bool] | None = None,
        limits: Limits = Limits(),
        window: int = 50_000,
        access: Mapping[str, Any] | None = None,
    ) -> None:
        self.url, self.keys, self.group, self.consumer = url, Keys(prefix), group, consumer
        self._knows, self._limits, self._window_size = knows, limits, window
        # Not the client's own retries: a repeated read would go on behind entries that never arrived.
        self._retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), retries=5, supported_errors=(*UNAVAILABLE, redis.BusyLoadingError))
        options = client_options(Retry(ExponentialBackoff(), retries=0), _ANSWER_S, access) | {"retry_on_error": []}
        try:
            self._redis: Any = redis.Redis.from_url(url, **options)
        except ValueError:
            raise url_error(url) from None
        self.restore({})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise service_error(error, self.url) from error

    def _ask(self, command: Callable[[], Any]) -> Any:
        with self._errors():
            return self._retry.call_with_retry(command, self._lose_place)

    def state(self) -> dict[str, Any]:
        """JSON values from which `restore` goes on: position, entries seen, window and counts."""
        return {"position": self.position, "seen": self.seen, "window": list(self._window), "rejected": dict(self.rejected)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind the entry where `state` was taken; an empty one is the beginning of the stream."""
        self.position: str = state.get("position", START)
        self.seen: int = state.get("seen", 0)
        self._window: dict[str, None] = dict.fromkeys(state.get("window", ()))  # in the order of arrival
        self.rejected: Counter[str] = Counter(state.get("rejected", {}))
        self._placed = False

    def seek(self, position: str) -> None:
        """Replay from behind a stream id; the window stays, so that events it holds are not handed out again."""
        self.position, self._placed = position, False

    def _lose_place(self, _error: Exception) -> None:
        self._placed = False

    def _place(self) -> None:
        """Put the group where this reader stands: there, and not in Redis, is the truth."""
        try:
            self._redis.xgroup_create(self.keys.events, self.group, self.position, mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
            self._redis.xgroup_setid(self.keys.events, self.group, self.position)

    def read(self, count: int, block_ms: int = 0) -> list[tuple[str, Event]]:
        """The next entries, fewer than `count` where some are quarantined or copies.

        Args:
            count: entries at most.
            block_ms: how long to wait for the first one, at most two seconds; 0 does not wait.

        Returns:
            stream id and event, in the order of the stream.
        """
        entries = self._ask(lambda: self._read(count, block_ms))
        judged = [(entry_id.decode(), self._judge(entry_id, fields)) for entry_id, fields in entries]
        refused = [(entry, reason) for entry, (_, reason) in zip(entries, judged, strict=True) if isinstance(reason, str)]
        if refused:  # before anything changes here: if it fails, all of the entries come again
            self._ask(lambda: self._quarantine(refused))
            self.rejected.update(reason for _, reason in refused)
        fresh = [(entry_id, event) for entry_id, event in judged if isinstance(event, Event) and self._is_new(event.event_id)]
        if judged:
            self.position, self.seen = judged[-1][0], self.seen + len(judged)
        self._placed = True
        return fresh

    def _read(self, count: int, block_ms: int) -> list[_Entry]:
        if not self._placed:
            self._place()
        self._placed = False  # until the answer has been dealt with: the group moves on without it
        wait = min(block_ms, _MAX_BLOCK_MS) or None
        try:
            answer = self._redis.xreadgroup(self.group, self.consumer, {self.keys.events: ">"}, count=count, block=wait)
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):  # the stream was deleted, or Redis lost it
                raise
            self._place()
            answer = []
        return list(answer[0][1]) if answer else []

    def _judge(self, entry_id: bytes, fields: Mapping[bytes, bytes]) -> Event | str:
        """The event of an entry, or why it cannot be used."""
        try:
            event = _decode_event(fields, _time_of(entry_id), self._limits)
        except _UnusableError as error:
            return str(error)
        return event if self._knows is None or self._knows(event.item_id) else "unknown item"

    def _is_new(self, event_id: str) -> bool:
        if event_id in self._window:
            self.rejected["duplicate"] += 1
            return False
        self._window[event_id] = None
        if len(self._window) > self._window_size:
            del self._window[next(iter(self._window))]
        return True

    def _quarantine(self, refused: Sequence[tuple[_Entry, str]]) -> None:
        pipe = self._redis.pipeline(transaction=False)
        for (entry_id, fields), reason in refused:
            content = fields.get(_FIELD, repr(dict(fields)).encode())[: self._limits.max_bytes]
            pipe.xadd(self.keys.quarantine, {b"reason": reason, _FIELD: content}, id=entry_id, maxlen=_QUARANTINED, approximate=True)
        pipe.xack(self.keys.events, self.group, *(entry_id for (entry_id, _), _ in refused))
        for answer in pipe.execute(raise_on_error=False):
            # An id that is not new is of an entry that was quarantined before a restart.
            if isinstance(answer, redis.RedisError) and "equal or smaller" not in str(answer):
                raise answer

    def acknowledge(self, position: str) -> None:
        """Say that everything up to a position is in a committed checkpoint."""

        def some() -> int:
            pending = self._redis.xpending_range(self.keys.events, self.group, "-", position, _PENDING)
            if pending:
                self._redis.xack(self.keys.events, self.group, *(entry["message_id"] for entry in pending))
            return len(pending)

        try:
            while self._ask(some) == _PENDING:
                pass
        except ServiceError as error:
            if "NOGROUP" not in str(error):
                raise

    def lag(self) -> Lag:
        """How far behind this reader is; entries that the stream dropped before they were read are counted and logged."""
        try:
            about = self._ask(lambda: self._redis.xinfo_stream(self.keys.events))
        except ServiceError as error:
            if "no such key" not in str(error):
                raise
            return Lag(0, 0.0)
        dropped = about["entries-added"] - about["length"]
        if (missed := dropped - self.seen) > 0:
            self.rejected[_TRIMMED] += missed
            self.seen = dropped
            get_logger("stream").error("the stream dropped events before they were read", events=missed, mend="raise streaming.max_length")
        entries = max(about["entries-added"] - self.seen, 0)
        after = self._ask(lambda: self._redis.xrange(self.keys.events, f"({self.position}", "+", 1)) if entries else []
        return Lag(entries, max(time.time() - _time_of(after[0][0]) / 1000, 0.0) if after else 0.0)


def _time_of(entry_id: bytes) -> int:
    """When an entry arrived, milliseconds since the epoch by the clock of Redis."""
    return int(entry_id.partition(b"-")[0])
