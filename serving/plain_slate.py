"""The one request that must be fast, answered before the framework: a user's slate, asked for plainly.

Only what is asked for rightly is taken: a valid `k` or none, no segment. All else, and whatever fails, goes on
to the route that FastAPI documents, which answers the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.errors import RankGRError
from serving.request_id import HEADER, request_id_of
from serving.slate_json import Answer

PATH = "/v1/users/{user_id:path}/slate"  # `:path` lets ids hold slashes: they are opaque
JSON = "application/json"
_HEAD, _, _TAIL = re.split(r"(\{.*\})", PATH)
_PLAIN_K = re.compile(rb"k=([1-9][0-9]{0,5})")


class Lookup(Protocol):
    """Answers for users, counted."""

    async def __call__(self, user_ids: Sequence[str], k: int, segment: str = "") -> list[Answer]:
        """See `serving.retrieval.Retrieval.slates`."""
        ...


class PlainSlate:
    """`GET /v1/users/{user_id}/slate` with no query, or with one valid `k`.

    Args:
        app: answers everything else.
        look_up: answers.
        default_k: without a query.
        max_k: the largest k.
        echo_request_id: see `serving.request_id.RequestId`.
    """

    def __init__(self, app: ASGIApp, look_up: Lookup, *, default_k: int, max_k: int, echo_request_id: bool = True) -> None:
        self._app, self._look_up, self._default_k, self._max_k, self._echo = app, look_up, default_k, max_k, echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        asked = self._asked(scope)
        if asked is None or not await self._answered(asked, scope, send):
            await self._app(scope, receive, send)

    async def _answered(self, asked: tuple[str, int], scope: Scope, send: Send) -> bool:
        request_id = request_id_of(scope)
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            (answer,) = await self._look_up([asked[0]], asked[1])
        except RankGRError:
            scope["headers"] = [*(pair for pair in scope["headers"] if pair[0] != HEADER), (HEADER, request_id.encode())]
            return False
        headers = [
            (b"content-type", JSON.encode()),
            (b"content-length", b"%d" % len(answer.body)),
        ]
        if self._echo:
            headers.append((HEADER, request_id.encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})
        return True

    def _asked(self, scope: Scope) -> tuple[str, int] | None:
        """User and k."""
        if scope["type"] != "http" or scope["method"] != "GET" or scope.get("root_path"):
            return None
        path = scope["path"]
        if not (path.startswith(_HEAD) and path.endswith(_TAIL) and len(path) > len(_HEAD) + len(_TAIL)):
            return None
        k = self._k(scope["query_string"])
        return None if k is None else (path[len(_HEAD) : -len(_TAIL)], k)

    def _k(self, query: bytes) -> int | None:
        if not query:
            return self._default_k
        plain = _PLAIN_K.fullmatch(query)
        return int(plain[1]) if plain and int(plain[1]) <= self._max_k else None
