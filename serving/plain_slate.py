"""The one request that must be fast, answered before the framework: a user's slate, asked for plainly.

Only what is asked for rightly is taken: a valid `k` or none, no segment. All else, and whatever fails, goes on
to the route that FastAPI documents, which answers the same.

Behind HAProxy the connections end in the replicas themselves, and Ray Serve's way from there to the application (tasks, a
queue, a look for the route, counters of its own) takes longer than the answer. `AnswerHere` stands in front of it and
answers in the same event loop; where another process or another loop has the application, it passes everything on. What is
answered so is in this service's metrics, not in Ray Serve's, and is not counted towards `max_ongoing_requests`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.errors import RankGRError
from serving.request_id import HEADER, request_id_of

if TYPE_CHECKING:  # Ray Serve's proxies import this module, and need nothing of what an answer is made of
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
        look_up: answers.
        default_k: without a query.
        max_k: the largest k.
    """

    def __init__(self, look_up: Lookup, *, default_k: int, max_k: int) -> None:
        self._look_up, self._default_k, self._max_k = look_up, default_k, max_k

    async def answered(self, scope: Scope, send: Send, *, echo_request_id: bool) -> bool:
        """Answer, or return False: then the request is somebody else's, and nothing was sent.

        Args:
            scope: of the request.
            send: takes the answer.
            echo_request_id: see `serving.request_id.RequestId`.
        """
        asked = self._asked(scope)
        if asked is None:
            return False
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
        if echo_request_id:
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


_RUNNING: dict[asyncio.AbstractEventLoop, PlainSlate] = {}


@contextmanager
def answering(plain: PlainSlate) -> Iterator[None]:
    """Let `AnswerHere` answer from `plain` in this event loop."""
    loop = asyncio.get_running_loop()
    _RUNNING[loop] = plain
    try:
        yield
    finally:
        del _RUNNING[loop]


class AnswerHere:
    """ASGI middleware of whatever ends the connections: answers plain slates where the application runs in this event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        plain = _RUNNING.get(asyncio.get_running_loop())
        if plain is None or not await plain.answered(scope, send, echo_request_id=True):
            await self.app(scope, receive, send)
