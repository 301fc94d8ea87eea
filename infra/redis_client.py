"""How clients of Redis (or Valkey) are made, and what their errors say; passwords never reach a message."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff

from infra.credentials import read_secret, without_password
from infra.errors import ConfigError, ServiceError
from infra.service_sections import SlateStoreConfig
from infra.slate_codec import Keys

REDIS_URL = "RANKGR_REDIS_URL"
UNAVAILABLE = (redis.ConnectionError, redis.TimeoutError)


def redis_url_of(config: SlateStoreConfig) -> str:
    """The URL that is set, or the one in the environment.

    Raises:
        ConfigError: neither is there.
    """
    url = config.url or os.environ.get(REDIS_URL, "")
    if not url:
        raise ConfigError("no Redis is named", where="slate_store.url", mend=f"--set slate_store.url=redis://..., or set {REDIS_URL}")
    return url


def service_error(error: redis.RedisError, url: str) -> ServiceError:
    """What went wrong with Redis, and the way out."""
    where = without_password(url)
    if isinstance(error, redis.AuthenticationError):
        return ServiceError("Redis refused the password", where=where, mend="check slate_store.username and password, or those in the URL")
    if isinstance(error, redis.exceptions.NoPermissionError):
        return ServiceError("Redis forbids a command or a key", where=where, mend="allow this user the keys below slate_store.prefix")
    if isinstance(error, UNAVAILABLE):
        return ServiceError("Redis does not answer", where=where, mend="start it, or check slate_store.url and RANKGR_REDIS_URL")
    return ServiceError(f"Redis refused a command: {error}", where=where, mend="check its memory limit, role and access rules")


def access_of(config: SlateStoreConfig, url: str) -> dict[str, Any]:
    """Options of a client that follow from the settings: user, password, certificate authority.

    Raises:
        ConfigError: a reference leads nowhere, or a CA file is named for a connection without TLS.
    """
    references = {"username": config.username, "password": config.password}
    access: dict[str, Any] = {name: read_secret(one, f"slate_store.{name}") for name, one in references.items() if one}
    if config.ca_file:
        if not url.startswith("rediss://"):
            raise ConfigError(
                "slate_store.ca_file is set but the URL is not rediss://", where=without_password(url), mend="write rediss://"
            )
        access["ssl_ca_certs"] = config.ca_file
    return access


def client_options(retry: Any, timeout_s: float, access: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments of a client: what is tried again, the limit of one attempt, and what `access_of` gives."""
    return {
        "retry": retry,
        "retry_on_error": [*UNAVAILABLE, redis.BusyLoadingError],
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        **(access or {}),
    }


def url_error(url: str) -> ConfigError:
    """For a URL that redis-py cannot read, whose own message may quote the password."""
    return ConfigError("slate_store.url is not a Redis URL", where=without_password(url), mend="write redis://HOST:PORT/DB")


class AsyncClient:
    """A connection for an event loop that answers users: few retries, short time limits.

    Args:
        url: redis:// or rediss:// URL.
        prefix: first part of every key.
        timeout_s: limit of one attempt to connect or to get an answer.
        access: options of the client, see `access_of`.

    Raises:
        ConfigError: URL or prefix are not usable.
    """

    def __init__(self, url: str, *, prefix: str, timeout_s: float, access: Mapping[str, Any] | None) -> None:
        self.url, self.keys = url, Keys(prefix)
        retry = AsyncRetry(ExponentialBackoff(cap=0.05, base=0.01), retries=1)
        try:
            self._redis: Any = redis.asyncio.Redis.from_url(url, **client_options(retry, timeout_s, access))
        except ValueError:
            raise url_error(url) from None  # its message may quote the password

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise service_error(error, self.url) from error
