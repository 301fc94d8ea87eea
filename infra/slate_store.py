"""Redis (or Valkey) with the slates: one packed blob a user under a model version, the version pointer switched last.

A publisher writes the slates of a version, then the popular fallback, then marks the version complete and only then
makes it active. A reader fetches the pointer and the slates in one command, so it sees one version at a time and
an interrupted publisher changes nothing for it. The near-line half of RankGR's serving (3.4): slates are computed
ahead of the request and looked up when it comes.

    {prefix}:active                      version that readers see
    {prefix}:versions                    sorted set: version -> time of its first slate (µs)
    {prefix}:retired                     sorted set: version -> when it ceased to be the active one (µs)
    {prefix}:meta:{version}              hash, written when every slate of the version is in
    {prefix}:parts:{version}             hash: job and part -> users, while the version is being published
    {prefix}:fallback:{version}          popular items, for users without a slate
    {prefix}:slate:{version}:{user_id}   one slate
    {prefix}:history:{user_id}           what the user did, whatever the version
    {prefix}:events, {prefix}:quarantine see `infra.event_stream`
    {prefix}:recent, :seen, :claim       see `infra.activity`

User ids are opaque and stand at the end of a key, so no separator in them can make one key look like another.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, Self, TypeVar

import redis
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from infra.coalesce import Coalescer
from infra.credentials import without_password
from infra.errors import IntegrityError, ServiceError
from infra.redis_client import AsyncClient, access_of, client_options, service_error, url_error
from infra.service_sections import SlateStoreConfig
from infra.slate_codec import Keys, Slate, UserHistory, decode_history, decode_slate, encode_history, encode_slate

__all__ = ["AsyncSlateReader", "Found", "Slate", "SlateStore", "UserHistory", "without_password"]

T = TypeVar("T")
_READ_ATTEMPTS = 5
_PARTS_LIFE = 0.5  # of a slate's: whoever goes on with what another attempt began must not show slates that are about to expire


class Found(NamedTuple):
    """What a look-up of some users found, all of it of one version.

    Attributes:
        version: the active one; None: there is none.
        slates: user -> slate, of those that have one.
        damaged: user -> what is wrong with the slate that is stored for them.
    """

    version: str | None
    slates: dict[str, Slate]
    damaged: dict[str, IntegrityError]

    def intact(self) -> dict[str, Slate]:
        """The slates; raises `IntegrityError` if one is damaged."""
        for error in self.damaged.values():
            raise error
        return self.slates


class SlateStore:
    """Synchronous side: what publishers and command-line tools do.

    Args:
        url: redis:// or rediss:// URL.
        prefix: first part of every key.
        ttl_hours: life of a slate; up to a tenth is added at random, so that they do not expire all at once.
        keep_versions: so many of the newest versions `drop_old` keeps, the active one counted if it is among them.
        grace_minutes: how long it keeps older ones after they were last active, or first written.
        access: options of the client, see `infra.redis_client.access_of`.

    Raises:
        ConfigError: URL or prefix are not usable.
        ServiceError: by every method, when Redis does not answer after a few retries with back-off.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "rankgr",
        ttl_hours: float = 72.0,
        keep_versions: int = 2,
        grace_minutes: float = 0.0,
        access: Mapping[str, Any] | None = None,
    ) -> None:
        self.url, self.keys, self._keep = url, Keys(prefix), keep_versions
        self._ttl_ms, self._grace_us = int(ttl_hours * 3_600_000), int(grace_minutes * 60_000_000)
        options = client_options(Retry(ExponentialBackoff(cap=1.0, base=0.05), retries=5), 5.0, access)
        try:
            self._redis: Any = redis.Redis.from_url(url, **options)
        except ValueError:
            raise url_error(url) from None  # its message may quote the password

    @classmethod
    def of(cls, config: SlateStoreConfig, url: str) -> Self:
        """The store of the settings, at a URL."""
        return cls(
            url,
            prefix=config.prefix,
            ttl_hours=config.ttl_hours,
            keep_versions=config.keep_versions,
            grace_minutes=config.grace_minutes,
            access=access_of(config, url),
        )

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

    def ping(self) -> None:
        """Raise `ServiceError` unless Redis answers."""
        with self._errors():
            self._redis.ping()

    def publish(self, version: str, slates: Iterable[Slate], batch: int = 500) -> int:
        """Write slates of a version, over those that are there.

        Returns:
            how many were written.
        """
        self.register(version)
        return self._write(((self.keys.slate(version, slate.user_id), encode_slate(slate)) for slate in slates), batch)

    def publish_fallback(self, version: str, slate: Slate) -> None:
        """Write the popular items of a version; they live until the version is dropped."""
        with self._errors():
            self._redis.set(self.keys.fallback(version), encode_slate(slate))

    def publish_histories(self, histories: Iterable[UserHistory], batch: int = 500) -> int:
        """Write what users did; returns for how many."""
        return self._write(((self.keys.history(history.user_id), encode_history(history)) for history in histories), batch)

    def put_one(self, slate: Slate) -> None:
        """Write one slate under its own version."""
        self.publish(slate.model_version, [slate])

    def _write(self, blobs: Iterable[tuple[str, bytes]], batch: int) -> int:
        written = 0
        with self._errors():
            for chunk in _chunks(blobs, batch):
                pipe = self._redis.pipeline(transaction=False)
                for key, blob in chunk:
                    pipe.set(key, blob, px=jittered(self._ttl_ms))
                pipe.execute()
                written += len(chunk)
        return written

    def mark_part(self, version: str, job: str, part: str, users: int) -> None:
        """Note that a part of a version is in, after all of its slates."""
        key = self.keys.parts(version)
        with self._errors():
            pipe = self._redis.pipeline(transaction=True)
            pipe.hset(key, f"{job}:{part}", users)
            pipe.pexpire(key, int(_PARTS_LIFE * self._ttl_ms), nx=True)
            pipe.execute()

    def parts(self, version: str, job: str) -> dict[str, int]:
        """Parts of a version that are in, and for how many users.

        Args:
            version: that is being published.
            job: identifies what is published; parts of another job are not among them.
        """
        with self._errors():
            found = {_text(name): int(users) for name, users in self._redis.hgetall(self.keys.parts(version)).items()}
        return {name.removeprefix(f"{job}:"): users for name, users in found.items() if name.startswith(f"{job}:")}

    def forget_parts(self, version: str) -> None:
        """Let the next publisher of a version begin anew."""
        with self._errors():
            self._redis.unlink(self.keys.parts(version))

    def complete(self, version: str, *, users: int) -> None:
        """Mark that every slate of a version has been written."""
        self.register(version)
        with self._errors():
            self._redis.hset(self.keys.meta(version), mapping={"users": users, "completed_at": time.time_ns() // 1_000_000})

    def register(self, version: str) -> None:
        """Make a version known, so that slates of it may be put."""
        self.keys.meta(version)  # refuses a name that is not usable
        with self._errors():
            self._redis.zadd(self.keys.versions, {version: _now_us()}, nx=True)

    def activate(self, version: str) -> None:
        """Show a version to the readers.

        Raises:
            IntegrityError: the version was never completed.
        """
        with self._errors():
            if not self._redis.exists(self.keys.meta(version)):
                raise IntegrityError(
                    "the slates of this version are not complete",
                    where=f"{without_password(self.url)} {version}",
                    mend="run `rankgr precompute`",
                )
            before = self._redis.set(self.keys.active, version, get=True)
            if before is not None:
                self._redis.zadd(self.keys.retired, {before: _now_us()})

    def versions(self) -> list[str]:
        """All versions with slates, the newest first, complete or not."""
        with self._errors():
            return [_text(name) for name in self._redis.zrevrange(self.keys.versions, 0, -1)]

    def users(self, version: str) -> int | None:
        """How many users a complete version was announced with; None while it is not complete."""
        with self._errors():
            value = self._redis.hget(self.keys.meta(version), "users")
        return None if value is None else int(value)

    def count(self, version: str) -> int:
        """How many slates of a version are there now; walks over all keys."""
        with self._errors():
            return sum(1 for _ in self._redis.scan_iter(match=self.keys.slates(version), count=1000))

    def user_ids(self, version: str) -> Iterator[str]:
        """Users with a slate of a version, in no order, some perhaps twice; walks over all keys."""
        start = len(self.keys.slates(version)) - 1  # without the pattern's star
        with self._errors():
            for key in self._redis.scan_iter(match=self.keys.slates(version), count=1000):
                yield _text(key)[start:]

    def last_seen(self) -> list[str]:
        """Users that were active lately, the latest first (`infra.activity`)."""
        with self._errors():
            return [_text(user_id) for user_id in self._redis.zrevrange(self.keys.seen, 0, -1)]

    def drop_old(self) -> list[str]:
        """Delete all versions but the active one, the newest `keep_versions`, and those active or written within the grace period.

        Returns:
            those that went.
        """
        active, versions = self.active_version(), self.versions()
        with self._errors():
            written = self._redis.zrange(self.keys.versions, 0, -1, withscores=True)
            last_use = dict(written) | dict(self._redis.zrange(self.keys.retired, 0, -1, withscores=True))
            too_late = _now_us() - self._grace_us
            dropped = [one for one in versions[self._keep :] if one != active and last_use.get(one.encode(), 0.0) <= too_late]
            for version in dropped:
                # Marker first: from here on nobody can activate what is being taken apart.
                self._redis.unlink(self.keys.meta(version), self.keys.fallback(version), self.keys.parts(version))
                for chunk in _chunks(self._redis.scan_iter(match=self.keys.slates(version), count=1000), 1000):
                    self._redis.unlink(*chunk)
                self._redis.zrem(self.keys.versions, version)
                self._redis.zrem(self.keys.retired, version)
        return dropped

    def active_version(self) -> str | None:
        """The version that readers see."""
        with self._errors():
            return _text_or_none(self._redis.get(self.keys.active))

    def get(self, user_id: str) -> Slate | None:
        """The active slate of a user."""
        return self.get_many([user_id]).get(user_id)

    def get_many(self, user_ids: Sequence[str]) -> dict[str, Slate]:
        """The active slates of those users that have one, all of the same version; raises `IntegrityError` if one is damaged."""
        known = self.active_version()
        for _ in range(_READ_ATTEMPTS):
            with self._errors():
                current, *blobs = self._redis.mget(_names(self.keys, known, user_ids))
            if (found := _settled(known, current, user_ids, blobs)) is not None:
                return found.intact()
            known = _text_or_none(current)
        raise _restless(self.url)

    def fallback(self) -> Slate | None:
        """The popular items of the active version."""
        version = self.active_version()
        with self._errors():
            blob = self._redis.get(self.keys.fallback(version)) if version else None
        return None if blob is None else decode_slate("", blob)

    def history(self, user_id: str) -> UserHistory | None:
        """What a user did, if it was published."""
        with self._errors():
            blob = self._redis.get(self.keys.history(user_id))
        return None if blob is None else decode_history(user_id, blob)


class AsyncSlateReader(AsyncClient):
    """The same store for an event loop that answers users: few retries, short time limits.

    Args:
        url: redis:// or rediss:// URL.
        prefix: first part of every key.
        ttl_hours: life of a slate that `put` writes.
        timeout_s: limit of one attempt to connect or to get an answer.
        access: options of the client, see `infra.redis_client.access_of`.

    Raises:
        ConfigError: URL or prefix are not usable.
        ServiceError: by every method, when Redis does not answer.
    """

    def __init__(
        self, url: str, *, prefix: str = "rankgr", ttl_hours: float = 72.0, timeout_s: float = 0.5, access: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(url, prefix=prefix, timeout_s=timeout_s, access=access)
        self.ttl_ms = int(ttl_hours * 3_600_000)
        self._known: str | None = None
        self._reads = Coalescer(self._mget)

    @classmethod
    def of(cls, config: SlateStoreConfig, url: str) -> Self:
        """The reader of the settings, at a URL."""
        return cls(url, prefix=config.prefix, ttl_hours=config.ttl_hours, access=access_of(config, url))

    async def active_version(self) -> str | None:
        """The version that readers see."""
        async with self._errors():
            return _text_or_none(await self._redis.get(self.keys.active))

    async def get(self, user_id: str) -> Slate | None:
        """The active slate of a user."""
        return (await self.get_many([user_id])).get(user_id)

    async def get_many(self, user_ids: Sequence[str]) -> dict[str, Slate]:
        """The active slates of those users that have one, all of the same version; raises `IntegrityError` if one is damaged."""
        return (await self.look_up(user_ids)).intact()

    async def look_up(self, user_ids: Sequence[str]) -> Found:
        """The active slates of some users; one that is damaged keeps nobody else from theirs.

        One round trip, shared with whoever asks meanwhile: the pointer is read beside the slates of the version seen last,
        and only where it has moved are they read again.
        """
        known = self._known
        for _ in range(_READ_ATTEMPTS):
            current, *blobs = await self._reads.get(_names(self.keys, known, user_ids))
            if (found := _settled(known, current, user_ids, blobs)) is not None:
                return found
            self._known = known = _text_or_none(current)
        raise _restless(self.url)

    async def _mget(self, names: Sequence[str]) -> Sequence[Any]:
        async with self._errors():
            values: Sequence[Any] = await self._redis.mget(names)
        return values

    async def fallback(self, version: str) -> Slate | None:
        """The popular items of a version."""
        async with self._errors():
            blob = await self._redis.get(self.keys.fallback(version))
        return None if blob is None else decode_slate("", blob)

    async def put(self, slates: Sequence[Slate]) -> list[bool]:
        """Write fresh slates unless their version is unknown, as a dropped one is; returns for each whether it was written.

        Raises:
            ServiceError: Redis does not answer, or refuses one; others may have been written.
        """
        commands = [
            ("SET", self.keys.slate(one.model_version, one.user_id), encode_slate(one), "PX", jittered(self.ttl_ms)) for one in slates
        ]
        versions = list(dict.fromkeys(slate.model_version for slate in slates))
        scores = await self.ask([("ZSCORE", self.keys.versions, version) for version in versions])
        known = {version for version, score in zip(versions, scores, strict=True) if score is not None}
        written = [slate.model_version in known for slate in slates]
        await self.ask([command for command, may in zip(commands, written, strict=True) if may])
        return written

    async def ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Answers to some commands in Redis' own words, in one round trip."""
        async with self._errors():
            pipe = self._redis.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            return list(await pipe.execute())


def _names(keys: Keys, known: str | None, user_ids: Sequence[str]) -> list[str]:
    """Keys for one MGET, which is atomic: the pointer, and the slates under the version that was seen last."""
    # Without a version there is nothing to look up, but the ids are checked all the same.
    names = [keys.slate(known or "none", user_id) for user_id in user_ids]
    return [keys.active, *(names if known else ())]


def _settled(known: str | None, current: bytes | None, user_ids: Sequence[str], blobs: Any) -> Found | None:
    """What was found, or None where the pointer has moved and the slates must be read again."""
    if _text_or_none(current) != known:
        return None
    found = Found(known, {}, {})
    if known is None or not user_ids:
        return found
    for user_id, blob in zip(user_ids, blobs, strict=True):
        if blob is not None:
            try:
                found.slates[user_id] = decode_slate(user_id, blob)
            except IntegrityError as error:
                found.damaged[user_id] = error
    return found


def _restless(url: str) -> ServiceError:
    return ServiceError(
        "the active version changed during every attempt to read", where=without_password(url), mend="stop one of the publishers"
    )


def _chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk


def jittered(ttl_ms: int) -> int:
    """A time to live, up to a tenth longer, so that what was written together does not expire together."""
    return ttl_ms + random.randrange(ttl_ms // 10 + 1)  # noqa: S311 - spreads expiry, no secret


def _now_us() -> int:
    return time.time_ns() // 1000


def _text(value: bytes) -> str:
    return value.decode()


def _text_or_none(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
