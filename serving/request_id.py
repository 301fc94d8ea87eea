"""A name for each request, on every log line it leads to and on its answer: the caller's `X-Request-ID`, else one made up."""

from __future__ import annotations

import re
import secrets

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
_USABLE = re.compile(r"[A-Za-z0-9._-]{1,128}")  # nothing that could forge a line of a log


class RequestId:
    """ASGI middleware that binds `request_id` for structlog.

    Args:
        app: what answers.
        echo: name the answer too; Ray Serve does that itself.
    """

    def __init__(self, app: ASGIApp, *, echo: bool = True) -> None:
        self.app, self.echo = app, echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on under its name."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = request_id_of(scope)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            return await self.app(scope, receive, named if self.echo else send)


def request_id_of(scope: Scope) -> str:
    """The name that the caller gave, if it is usable, else a new one."""
    given = next((str(value, "latin-1") for name, value in scope["headers"] if name == HEADER), "")
    return given if _USABLE.fullmatch(given) else secrets.token_hex(8)
