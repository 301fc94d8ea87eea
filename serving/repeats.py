"""A request whose replica dies goes to another one, inside Ray Serve's proxy, so that its caller does not notice.

Ray Serve's router finds another replica only where a dead one had not taken the request yet; what it was working on is
answered 500. Every request of this service may be done twice: reads change nothing, slates that are computed again are the
same, and an event that is written again has the same id, which is made from the name that the proxy gives to the request.
Behind HAProxy there is no such name: it repeats requests by settings of its own (`infra.cluster`), and an event in one may
be written twice.

Ray loads `middlewares` in its proxies (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, set by `infra.cluster`).
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.logs import get_logger
from serving.plain_slate import AnswerHere

_NAME_HEADER = b"x-rankgr-name"
_NAME = re.compile(rb"\d{20}-[0-9a-f]{8}")
_ATTEMPTS = 3  # a request that kills its replicas ends none but these


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxies run in front of the application; the last one stands in front of the others."""
    return [Middleware(RepeatAfterDeath), Middleware(AnswerHere)]


def name_of(scope: Scope) -> str:
    """The name of a request, the same in every attempt at it; names made later sort behind."""
    given = next((value for name, value in scope["headers"] if name == _NAME_HEADER), b"")
    return given.decode() if _NAME.fullmatch(given) else _new_name()


class RepeatAfterDeath:
    """ASGI middleware that passes an answer on once it is whole, and tries again where it does not become so.

    Answers of this service are short: none is a stream.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, up to three times."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [*(pair for pair in scope["headers"] if pair[0] != _NAME_HEADER), (_NAME_HEADER, _new_name().encode())]
        body, answer = _Body(receive), list[Message]()
        for _ in range(_ATTEMPTS):
            answer = []
            # A copy for each: the proxy adds to the headers.
            await self.app({**scope, "headers": list(headers)}, body.again(), _keep_in(answer))
            if _is_whole(answer) or body.caller_left:
                break
            get_logger("proxy").warning("a replica died over a request", path=scope["path"])
        if not _is_whole(answer) and not body.caller_left:
            problem = {"what": "the replicas that worked on this died", "mend": "send it again after the seconds of Retry-After"}
            await JSONResponse(problem, 503, {"Retry-After": "1"})(scope, receive, send)
            return
        for message in answer:
            await send(message)


class _Body:
    """What the caller sends, as often as it is wanted."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._seen: list[Message] = []

    @property
    def caller_left(self) -> bool:
        return any(message["type"] == "http.disconnect" for message in self._seen)

    def again(self) -> Receive:
        """The same from its beginning."""
        place = 0

        async def receive() -> Message:
            nonlocal place
            while place >= len(self._seen):
                self._seen.append(await self._receive())
            place += 1
            return self._seen[place - 1]

        return receive


def _keep_in(answer: list[Message]) -> Callable[[Message], Awaitable[None]]:
    async def keep(message: Message) -> None:
        answer.append(message)

    return keep


def _is_whole(answer: list[Message]) -> bool:
    return bool(answer) and answer[-1]["type"] == "http.response.body" and not answer[-1].get("more_body", False)


def _new_name() -> str:
    return f"{time.time_ns():020d}-{secrets.token_hex(4)}"
