"""How clients of Redis (or Valkey) are made, and what their errors say; passwords never reach a message."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

import redis

from infra.errors import ConfigError, ServiceError

UNAVAILABLE = (redis.ConnectionError, redis.TimeoutError)


def without_password(url: str) -> str:
    """A Redis URL fit for logs and messages: no user, password or query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def service_error(error: redis.RedisError, url: str) -> ServiceError:
    """What went wrong with Redis, and the way out."""
    where = without_password(url)
    if isinstance(error, redis.AuthenticationError):
        return ServiceError("Redis refused the password", where=where, mend="check user and password in slate_store.url")
    if isinstance(error, UNAVAILABLE):
        return ServiceError("Redis does not answer", where=where, mend="start it, or check slate_store.url and RANKGR_REDIS_URL")
    return ServiceError(f"Redis refused a command: {error}", where=where, mend="check its memory limit, role and access rules")


def client_options(retry: Any, timeout_s: float) -> dict[str, Any]:
    """Keyword arguments of a client: what is tried again, and the limit of one attempt."""
    return {
        "retry": retry,
        "retry_on_error": [*UNAVAILABLE, redis.BusyLoadingError],
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
    }


def url_error(url: str) -> ConfigError:
    """For a URL that redis-py cannot read, whose own message may quote the password."""
    return ConfigError("slate_store.url is not a Redis URL", where=without_password(url), mend="write redis://HOST:PORT/DB")
