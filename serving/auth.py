"""Bearer tokens: every request that may change something carries one (on wherever `serving.tokens` names any)."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.credentials import read_secret
from infra.errors import ConfigError
from infra.service_sections import ServingConfig

_SAFE = ("GET", "HEAD", "OPTIONS")
_GUARDED = ("/v1/users",)
"""Reads that need a token too: this one names users that the caller has not named."""
_MIN_CHARACTERS = 16
_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"


def token_digests(config: ServingConfig) -> list[str]:
    """SHA-256 of each accepted token: replicas and Ray's control plane see no token.

    Raises:
        ConfigError: other machines can reach the service and there is no token; a token is missing or short.
    """
    # Behind HAProxy, Ray Serve listens on all interfaces, whatever host is configured.
    reachable = not _is_loopback(config.host) or os.environ.get(_HAPROXY, "0") not in ("", "0")
    if not config.tokens and reachable:
        raise ConfigError(
            f"serving.host {config.host!r} or {_HAPROXY} opens the service to other machines, and no token is configured",
            where="serving.tokens",
            mend="export RANKGR_TOKEN=$(openssl rand -hex 32), and --set serving.tokens=[env:RANKGR_TOKEN]",
        )
    tokens = [read_secret(reference, "serving.tokens") for reference in config.tokens]
    if any(len(token) < _MIN_CHARACTERS for token in tokens):
        raise ConfigError(f"a token has less than {_MIN_CHARACTERS} characters", where="serving.tokens", mend="openssl rand -hex 32")
    return [_digest(token.encode()) for token in tokens]


class RequireToken:
    """ASGI middleware: requests other than reads are refused without a token, before their body is looked at."""

    def __init__(self, app: ASGIApp, digests: Sequence[str]) -> None:
        self.app, self.digests = app, digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        app: ASGIApp = self.app
        if scope["type"] == "http" and (scope["method"] not in _SAFE or scope["path"] in _GUARDED):
            given = dict(scope["headers"]).get(b"authorization", b"")
            app = app if self._knows(given) else _refusal(given)
        await app(scope, receive, send)

    def _knows(self, header: bytes) -> bool:
        scheme, _, token = header.partition(b" ")
        digest = _digest(token.strip())
        # All of them are compared, so that the time taken tells nothing.
        known = [hmac.compare_digest(digest, one) for one in self.digests]
        return scheme.lower() == b"bearer" and any(known)


def _refusal(given: bytes) -> JSONResponse:
    challenge = 'Bearer realm="rankgr"' + (', error="invalid_token"' if given else "")
    body = {"what": "this request needs a valid token", "mend": "send the header `Authorization: Bearer TOKEN`"}
    return JSONResponse(body, 401, {"WWW-Authenticate": challenge})


def _digest(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
