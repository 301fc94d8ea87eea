"""What users did since their timelines were published, in Redis: the next slate is computed from it, the next bulk run includes it.

{prefix}:recent:{user_id}    sorted set: [event id, item, level] by time; an event that is written twice is there once
{prefix}:seen                sorted set: user -> when they were last here, for those to come first when slates are refreshed
{prefix}:claim:{version}:{user_id}    somebody computes this slate
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from infra.errors import IntegrityError
from infra.event_stream import Event
from infra.logs import get_logger
from infra.slate_codec import UserHistory, decode_history
from infra.slate_store import AsyncSlateReader, jittered

MAX_RECENT = 1000
"""Events of a user that are kept until the next bulk run."""
MAX_SEEN = 100_000


class UserActivity:
    """Recent events on the connections of a reader; its methods raise what the reader's do.

    Args:
        reader: whose prefix and time to live count.
    """

    def __init__(self, reader: AsyncSlateReader) -> None:
        self._reader = reader

    async def record(self, events: Sequence[Event]) -> None:
        """Add events, in one round trip; those that are there already change nothing."""
        of_user: dict[str, list[Event]] = defaultdict(list)
        for event in events:
            of_user[event.user_id].append(event)
        commands: list[tuple[Any, ...]] = []
        for user_id, theirs in of_user.items():
            key = self._reader.keys.recent(user_id)
            pairs = [part for event in theirs for part in (event.timestamp_ms, _member(event))]
            commands += [
                ("ZADD", key, *pairs),
                ("ZREMRANGEBYRANK", key, 0, -MAX_RECENT - 1),
                ("PEXPIRE", key, jittered(self._reader.ttl_ms)),
            ]
        await self._reader.ask([*commands, *self._seen(list(of_user))])

    async def saw(self, user_id: str) -> None:
        """Note that a user is here."""
        await self._reader.ask(self._seen([user_id]))

    def _seen(self, user_ids: Sequence[str]) -> list[tuple[Any, ...]]:
        now, key = time.time_ns() // 1_000_000, self._reader.keys.seen
        return [("ZADD", key, *(part for user_id in user_ids for part in (now, user_id))), ("ZREMRANGEBYRANK", key, 0, -MAX_SEEN - 1)]

    async def history(self, user_id: str) -> UserHistory:
        """The published timeline with the events behind it that happened since."""
        return (await self.histories([user_id]))[0]

    async def histories(self, user_ids: Sequence[str]) -> list[UserHistory]:
        """The same for some users, in one round trip."""
        keys = self._reader.keys
        published = [("GET", keys.history(user_id)) for user_id in user_ids]
        recent = [("ZRANGE", keys.recent(user_id), 0, -1, "WITHSCORES") for user_id in user_ids]
        found = await self._reader.ask([*published, *recent])
        return [self._joined(*one) for one in zip(user_ids, found[: len(user_ids)], found[len(user_ids) :], strict=True)]

    def _joined(self, user_id: str, blob: bytes | None, recent: Sequence[Any]) -> UserHistory:
        published = self._decoded(user_id, blob) if blob else UserHistory(user_id, (), ())
        new = [json.loads(member) for member, score in _pairs(recent) if float(score) > published.until]
        return UserHistory(
            user_id,
            (*published.item_ids, *(item for _, item, _ in new)),
            (*published.levels, *(level for *_, level in new)),
            published.until,
        )

    def _decoded(self, user_id: str, blob: bytes) -> UserHistory:
        """One that is damaged, or of an earlier release, must not keep others from their slates: the next bulk run mends it."""
        try:
            return decode_history(user_id, blob)
        except IntegrityError as error:
            get_logger("activity").warning("a history is left out", reason=error.what)
            return UserHistory(user_id, (), ())

    async def users(self, version: str | None, limit: int) -> list[str]:
        """Some users: those seen last, then a few with a slate of a version, as a first step through the keys comes upon them."""
        start = ("SCAN", 0, "MATCH", self._reader.keys.slates(version), "COUNT", 10 * limit) if version else ("ECHO", "")
        seen, step = await self._reader.ask([("ZREVRANGE", self._reader.keys.seen, 0, limit - 1), start])
        skip = len(self._reader.keys.slates(version)) - 1 if version else 0  # without the pattern's star
        others = sorted(key[skip:] for key in step[1]) if version else []
        return [user_id.decode() for user_id in dict.fromkeys([*seen, *others])][:limit]

    async def claim(self, version: str, user_id: str, seconds: float) -> bool:
        """Whether the caller is the one to compute a slate, among all processes; the claim ends by itself."""
        (got,) = await self._reader.ask([("SET", self._reader.keys.claim(version, user_id), "", "NX", "PX", int(seconds * 1000))])
        return got is not None


def _member(event: Event) -> str:
    return json.dumps([event.event_id, event.item_id, event.level], ensure_ascii=False, separators=(",", ":"))


def _pairs(answer: Sequence[Any]) -> list[tuple[bytes, Any]]:
    """Members and scores: RESP2 sends them flat, RESP3 in pairs."""
    if answer and isinstance(answer[0], list | tuple):
        return [(member, score) for member, score in answer]
    return list(zip(answer[::2], answer[1::2], strict=True))
